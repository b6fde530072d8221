/* A kernel call: the runtime (native.py) fills it in, the thread pool (segment.c) and kernels' trampolines read it. */
#include <stdint.h>

typedef struct ft_call {
  void (*kernel)(int32_t lo, int32_t hi, const struct ft_call *call, int32_t worker);
  int32_t split, workers; /* workers: the most threads that may share it, or 0 */
  void *pointers[10];
  int32_t ints[40];
  float floats[6];
} ft_call;

#define EXPORT __attribute__((visibility("default")))
