/* A plugin for qemu-user: how often every instruction of a kernel ran and, if asked, what simulated caches missed.
 *
 *     qemu-aarch64 -plugin profile.so,out=FILE[,symbol=TEXT][,caches=WAYSxSETS] PROGRAM
 *
 * Only functions whose name contains TEXT count. FILE gets lines "insn SYMBOL ADDRESS COUNT DISASSEMBLY" (an address may
 * come more than once) and, with caches, "cache NAME MISSES WRITEBACKS": a first-level data cache with so many ways and
 * sets and behind it, as alternatives, second-level caches of 512 KB and 1 MB, 16 ways; lines of 64 bytes, least recently
 * used, no prefetching, addresses as the program sees them. QEMU's headers are not packaged, hence the declarations.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))
typedef uint64_t plugin_id;
struct qemu_plugin_tb;
struct qemu_plugin_insn;
void qemu_plugin_register_vcpu_tb_trans_cb(plugin_id, void (*)(plugin_id, struct qemu_plugin_tb *));
void qemu_plugin_register_vcpu_tb_exec_cb(struct qemu_plugin_tb *, void (*)(unsigned, void *), int flags, void *);
void qemu_plugin_register_vcpu_mem_cb(struct qemu_plugin_insn *, void (*)(unsigned, uint32_t, uint64_t, void *),
                                      int flags, int rw, void *);
void qemu_plugin_register_atexit_cb(plugin_id, void (*)(plugin_id, void *), void *);
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *);
struct qemu_plugin_insn *qemu_plugin_tb_get_insn(const struct qemu_plugin_tb *, size_t);
uint64_t qemu_plugin_insn_vaddr(const struct qemu_plugin_insn *);
const char *qemu_plugin_insn_symbol(const struct qemu_plugin_insn *);
char *qemu_plugin_insn_disas(const struct qemu_plugin_insn *);
_Bool qemu_plugin_mem_is_store(uint32_t);
EXPORT int qemu_plugin_version = PLUGIN_VERSION;

enum { NO_REGISTERS = 0, READS_AND_WRITES = 3, LINE_bits = 6 };

/* -- counting ------------------------------------------------------------------------------------------------------ */

typedef struct block {
  struct block *next;
  uint64_t runs;
  const char *symbol; /* kept by QEMU */
  size_t count;
  struct { uint64_t address; char *text; } instructions[];
} block;

static block *blocks;
static const char *out_path, *wanted = "";
static int with_caches;

static void ran(unsigned cpu, void *data) {
  (void)cpu;
  ((block *)data)->runs++;
}

/* -- caches -------------------------------------------------------------------------------------------------------- */

typedef struct {
  const char *name;
  unsigned sets, ways;
  uint64_t misses, writebacks;
  uint64_t *lines; /* per set, the latest first; line number + 1, 0: empty */
  uint8_t *dirty;
} cache;

static cache first_level = {.name = "first"};
static cache second_levels[] = {{.name = "512KB", .sets = 512, .ways = 16}, {.name = "1MB", .sets = 1024, .ways = 16}};

static void make(cache *c) {
  c->lines = calloc(c->sets * c->ways, sizeof *c->lines);
  c->dirty = calloc(c->sets * c->ways, sizeof *c->dirty);
}

/* Touch a line. Whether it missed; `evicted` gets the line + 1 that was written back for it, or 0. */
static int touch(cache *c, uint64_t line, int store, uint64_t *evicted) {
  uint64_t *lines = c->lines + line % c->sets * c->ways;
  uint8_t *dirty = c->dirty + line % c->sets * c->ways, is_dirty = (uint8_t)store;
  uint64_t i = 0;
  *evicted = 0;
  while (i < c->ways && lines[i] != line + 1) i++;
  int missed = i == c->ways;
  if (missed) {
    i--;
    c->misses++;
    if (lines[i] && dirty[i]) {
      c->writebacks++;
      *evicted = lines[i];
    }
  } else {
    is_dirty |= dirty[i];
  }
  memmove(lines + 1, lines, i * sizeof *lines);
  memmove(dirty + 1, dirty, i);
  lines[0] = line + 1;
  dirty[0] = is_dirty;
  return missed;
}

static void accessed(unsigned cpu, uint32_t info, uint64_t address, void *data) {
  (void)cpu, (void)data;
  uint64_t evicted, ignored;
  if (!touch(&first_level, address >> LINE_bits, qemu_plugin_mem_is_store(info), &evicted)) return;
  for (size_t i = 0; i < sizeof second_levels / sizeof *second_levels; i++) {
    touch(&second_levels[i], address >> LINE_bits, 0, &ignored);
    if (evicted) touch(&second_levels[i], evicted - 1, 1, &ignored);
  }
}

/* -- the plugin ---------------------------------------------------------------------------------------------------- */

static void translated(plugin_id id, struct qemu_plugin_tb *tb) {
  (void)id;
  size_t count = qemu_plugin_tb_n_insns(tb);
  const char *symbol = qemu_plugin_insn_symbol(qemu_plugin_tb_get_insn(tb, 0));
  symbol = symbol && *symbol ? symbol : "?";
  if (!strstr(symbol, wanted)) return;
  block *made = malloc(sizeof *made + count * sizeof *made->instructions);
  *made = (block){blocks, 0, symbol, count};
  blocks = made;
  for (size_t i = 0; i < count; i++) {
    struct qemu_plugin_insn *instruction = qemu_plugin_tb_get_insn(tb, i);
    made->instructions[i].address = qemu_plugin_insn_vaddr(instruction);
    made->instructions[i].text = qemu_plugin_insn_disas(instruction);
    if (with_caches)
      qemu_plugin_register_vcpu_mem_cb(instruction, accessed, NO_REGISTERS, READS_AND_WRITES, NULL);
  }
  qemu_plugin_register_vcpu_tb_exec_cb(tb, ran, NO_REGISTERS, made);
}

static void print_cache(FILE *out, const cache *c) {
  fprintf(out, "cache %s %llu %llu\n", c->name, (unsigned long long)c->misses, (unsigned long long)c->writebacks);
}

static void ended(plugin_id id, void *data) {
  (void)id, (void)data;
  FILE *out = fopen(out_path, "w");
  if (!out) {
    perror(out_path);
    return;
  }
  for (const block *b = blocks; b; b = b->next) {
    for (size_t i = 0; b->runs && i < b->count; i++)
      fprintf(out, "insn %s %llx %llu %s\n", b->symbol, (unsigned long long)b->instructions[i].address,
              (unsigned long long)b->runs, b->instructions[i].text);
  }
  if (with_caches) {
    print_cache(out, &first_level);
    for (size_t i = 0; i < sizeof second_levels / sizeof *second_levels; i++) print_cache(out, &second_levels[i]);
  }
  fclose(out);
}

EXPORT int qemu_plugin_install(plugin_id id, const void *info, int argc, char **argv) {
  (void)info;
  for (int i = 0; i < argc; i++) {
    if (!strncmp(argv[i], "out=", 4)) out_path = strdup(argv[i] + 4);
    else if (!strncmp(argv[i], "symbol=", 7)) wanted = strdup(argv[i] + 7);
    else if (sscanf(argv[i], "caches=%ux%u", &first_level.ways, &first_level.sets) == 2) with_caches = 1;
    else return -1;
  }
  if (!out_path || (with_caches && !(first_level.ways && first_level.sets))) return -1;
  make(&first_level);
  for (size_t i = 0; i < sizeof second_levels / sizeof *second_levels; i++) make(&second_levels[i]);
  qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
  qemu_plugin_register_atexit_cb(id, ended, NULL);
  return 0;
}
