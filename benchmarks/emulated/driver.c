/* A program without a C library that runs kernels: it reads the number of a work and an arena from its standard input,
 * runs that work's calls, and writes the arena to its standard output. A generated file includes it and defines
 * ARENA_bytes and `run(work, arena)`. */
#include <stddef.h>
#include <stdint.h>

enum { INPUT, OUTPUT, BAD_INPUT = 2, BAD_OUTPUT };
#if defined(__aarch64__)
enum { READ = 63, WRITE = 64, EXIT = 93 };
static long system_call(long number, long a, long b, long c) {
  register long r0 __asm__("x0") = a;
  register long r1 __asm__("x1") = b, r2 __asm__("x2") = c, n __asm__("x8") = number;
  __asm__ volatile("svc 0" : "+r"(r0) : "r"(r1), "r"(r2), "r"(n) : "memory");
  return r0;
}
#else
enum { READ = 3, WRITE = 4, EXIT = 1 };
static long system_call(long number, long a, long b, long c) {
  register long r0 __asm__("r0") = a;
  register long r1 __asm__("r1") = b, r2 __asm__("r2") = c, n __asm__("r7") = number;
  __asm__ volatile("svc 0" : "+r"(r0) : "r"(r1), "r"(r2), "r"(n) : "memory");
  return r0;
}
#endif

void *memset(void *target, int value, size_t size) {
  for (char *at = target; size--; at++) *(volatile char *)at = (char)value;
  return target;
}

void *memcpy(void *target, const void *source, size_t size) {
  const char *from = source;
  for (char *at = target; size--; at++) *(volatile char *)at = *from++;
  return target;
}

/* aligned to a way of the largest simulated cache: what misses does not depend on the size of the program */
static _Alignas(65536) char arena[ARENA_bytes];
static void run(int32_t work, char *arena);

static void transfer(long call, int file, char *at, long size, int status) {
  while (size > 0) {
    long moved = system_call(call, file, (long)at, size);
    if (moved <= 0) system_call(EXIT, status, 0, 0);
    at += moved;
    size -= moved;
  }
}

void _start(void) {
  int32_t header[2]; /* the work, bytes of its arena */
  transfer(READ, INPUT, (char *)header, sizeof header, BAD_INPUT);
  if (header[1] > ARENA_bytes) system_call(EXIT, BAD_INPUT, 0, 0);
  transfer(READ, INPUT, arena, header[1], BAD_INPUT);
  run(header[0], arena);
  transfer(WRITE, OUTPUT, arena, header[1], BAD_OUTPUT);
  system_call(EXIT, 0, 0, 0);
}
