/* Segments: kernel calls executed in order by a fixed set of threads.
 *
 * Every call's work units are shared evenly by all threads, or by as many as it has scratch for, so that a thread finds
 * in its cache what it made before. Each takes its share piece by piece, and then pieces of those who are not done yet,
 * because something else had their core for a while. All meet at a barrier, which is also how a segment starts.
 *
 * A thread that waits spins; between segments, it soon sleeps in a futex. Inside one, the others are about to be done,
 * waking a sleeper can take longer than a small kernel, and a core that is offered to a busy program comes back late:
 * there it spins for longer, then offers its core until a millisecond is over, and only then sleeps. With one thread
 * there is nothing of this.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stddef.h>
#include <time.h>
#include <unistd.h>
#include <linux/futex.h>
#include <sys/syscall.h>
#include "segment.h"

enum { MAX_THREADS = 64, PIECES = 16, SPINS_PER_LOOK = 32 };
enum { SPIN_ns = 20000, SPIN_INSIDE_ns = 400000, YIELD_ns = 1000000 };

static struct {
  pthread_t workers[MAX_THREADS];
  int32_t threads; /* including the caller; 0 before ft_start */
  const ft_call *calls;
  int32_t count;
  int stopping;
  /* the barrier, on cache lines of its own */
  _Alignas(64) atomic_int arrived;
  _Alignas(64) atomic_uint phase;
  atomic_int sleepers;
  struct {
    _Alignas(64) atomic_int next; /* the first unit of a thread's share that nobody has taken */
  } shares[MAX_THREADS];
} pool;

static int64_t now_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static void relax(void) {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__) || defined(__arm__)
  __asm__ volatile("yield");
#endif
}

static int phase_is(unsigned old) { return atomic_load_explicit(&pool.phase, memory_order_acquire) == old; }

static void wait_for_phase(unsigned old, int inside) {
  int64_t start_ns = now_ns();
  do {
    for (int i = 0; i < SPINS_PER_LOOK; i++) {
      if (!phase_is(old)) return;
      relax();
    }
  } while (now_ns() < start_ns + (inside ? SPIN_INSIDE_ns : SPIN_ns));
  while (inside && now_ns() < start_ns + YIELD_ns) {
    if (!phase_is(old)) return;
    syscall(SYS_sched_yield);
  }
  /* The thread that ends the phase changes it, then looks for sleepers; this one counts itself, then looks at the
   * phase (the kernel does): in a sequentially consistent order at least one of them sees the other. */
  atomic_fetch_add(&pool.sleepers, 1);
  while (atomic_load(&pool.phase) == old) syscall(SYS_futex, &pool.phase, FUTEX_WAIT_PRIVATE, old, NULL, NULL, 0);
  atomic_fetch_sub(&pool.sleepers, 1);
}

static int32_t workers_of(const ft_call *call) {
  return call->workers && call->workers < pool.threads ? call->workers : pool.threads;
}

/* split * worker / workers, in 32 bits: 32-bit ARM has no instruction to divide more. */
static int32_t share_start(const ft_call *call, int32_t worker) {
  int32_t workers = workers_of(call);
  return call->split / workers * worker + call->split % workers * worker / workers;
}

static void open_call(const ft_call *call) {
  for (int32_t i = 0; i < workers_of(call); i++) {
    atomic_store_explicit(&pool.shares[i].next, share_start(call, i), memory_order_relaxed);
  }
}

/* Wait for all threads; the last one opens the next call, if any, while no other looks at one. */
static void barrier(int inside, const ft_call *next) {
  unsigned phase = atomic_load(&pool.phase);
  if (atomic_fetch_add(&pool.arrived, 1) + 1 < pool.threads) {
    wait_for_phase(phase, inside);
    return;
  }
  atomic_store(&pool.arrived, 0);
  if (next) open_call(next);
  atomic_store(&pool.phase, phase + 1);
  if (atomic_load(&pool.sleepers)) syscall(SYS_futex, &pool.phase, FUTEX_WAKE_PRIVATE, MAX_THREADS, NULL, NULL, 0);
}

static void run_call(const ft_call *call, int32_t worker) {
  int32_t workers = workers_of(call), even = call->split / (workers * PIECES), piece = even > 1 ? even : 1;
  for (int32_t i = 0; worker < workers && i < workers; i++) {
    int32_t owner = (worker + i) % workers, stop = share_start(call, owner + 1), lo;
    while ((lo = atomic_fetch_add(&pool.shares[owner].next, piece)) < stop) {
      call->kernel(lo, lo + piece < stop ? lo + piece : stop, call, worker);
    }
  }
}

static void run_calls(int32_t thread) {
  for (const ft_call *call = pool.calls, *end = call + pool.count; call < end; call++) {
    run_call(call, thread);
    barrier(1, call + 1 < end ? call + 1 : NULL);
  }
}

static void *work(void *thread) {
  for (;;) {
    barrier(0, NULL);
    if (pool.stopping) return NULL;
    run_calls((int32_t)(intptr_t)thread);
  }
}

/* Stop the pool and join its threads. */
EXPORT void ft_stop(void) {
  if (pool.threads > 1) {
    pool.stopping = 1;
    barrier(0, NULL);
    for (int32_t i = 1; i < pool.threads; i++) pthread_join(pool.workers[i], NULL);
  }
  pool.threads = 0;
}

/* Start the pool, with this many threads including the caller's. A pool that runs is stopped first. Returns 0 or an
 * errno. */
EXPORT int ft_start(int32_t threads) {
  if (threads < 1 || threads > MAX_THREADS) return EINVAL;
  ft_stop();
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_BLOCK, &all, &before); /* signals are for the program's own threads */
  pool.stopping = 0;
  pool.threads = threads;
  int error = 0;
  int32_t made = 1;
  while (made < threads && !(error = pthread_create(&pool.workers[made], NULL, work, (void *)(intptr_t)made))) made++;
  pthread_sigmask(SIG_SETMASK, &before, NULL);
  if (error) {
    /* stand in at the barrier for the threads that are missing */
    pool.stopping = 1;
    atomic_fetch_add(&pool.arrived, threads - made);
    barrier(0, NULL);
    for (int32_t i = 1; i < made; i++) pthread_join(pool.workers[i], NULL);
    pool.threads = 0;
  }
  return error;
}

/* Execute a segment. Without a pool the caller's thread does it alone. */
EXPORT void ft_run(const ft_call *calls, int32_t count) {
  if (pool.threads < 2) {
    for (const ft_call *call = calls; call < calls + count; call++) {
      if (call->split > 0) call->kernel(0, call->split, call, 0);
    }
    return;
  }
  if (count < 1) return;
  pool.calls = calls;
  pool.count = count;
  open_call(calls);
  barrier(0, NULL);
  run_calls(0);
}
