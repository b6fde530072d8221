/* A kernel library for the runtime's tests: the ABI of real ones, single-threaded, with kernels that numpy can check. */
#include <stdint.h>
#include <unistd.h>

typedef struct ft_call {
  void (*kernel)(int32_t lo, int32_t hi, const struct ft_call *call, int32_t worker);
  int32_t split, workers;
  void *pointers[10];
  int32_t ints[40];
  float floats[6];
} ft_call;

int ft_start(int32_t threads) { return threads > 1000 ? 11 : 0; }
void ft_stop(void) {}
void ft_run(const ft_call *calls, int32_t count) {
  for (int32_t i = 0; i < count; i++) calls[i].kernel(0, calls[i].split, &calls[i], 0);
}

/* out[c] = sum over rows of x[row][c]; units are columns */
void column_sum(int32_t lo, int32_t hi, const ft_call *call, int32_t worker) {
  const float *x = call->pointers[0];
  float *out = call->pointers[1];
  int32_t rows = call->ints[0], columns = call->ints[1];
  for (int32_t c = lo; c < hi; c++) {
    out[c] = 0;
    for (int32_t r = 0; r < rows; r++) out[c] += x[r * columns + c];
  }
}

/* out[i] += in[i] */
void add(int32_t lo, int32_t hi, const ft_call *call, int32_t worker) {
  const float *in = call->pointers[0];
  float *out = call->pointers[1];
  for (int32_t i = lo; i < hi; i++) out[i] += in[i];
}

/* out[i] = in[i] * factor */
void scale(int32_t lo, int32_t hi, const ft_call *call, int32_t worker) {
  const float *in = call->pointers[0];
  float *out = call->pointers[1];
  for (int32_t i = lo; i < hi; i++) out[i] = in[i] * call->floats[0];
}

/* out[0] = sum of in[0 .. ints[0]) */
void total(int32_t lo, int32_t hi, const ft_call *call, int32_t worker) {
  const float *in = call->pointers[0];
  float *out = call->pointers[1];
  out[0] = 0;
  for (int32_t i = 0; i < call->ints[0]; i++) out[0] += in[i];
}

/* w[i] -= learning_rate[0] * g[i] ; and g[i] = 0, as an update in place may spoil its gradient */
void sgd(int32_t lo, int32_t hi, const ft_call *call, int32_t worker) {
  float *w = call->pointers[0], *g = call->pointers[1];
  const float *learning_rate = call->pointers[2];
  for (int32_t i = lo; i < hi; i++) {
    w[i] -= learning_rate[0] * g[i];
    g[i] = 0;
  }
}

/* takes ints[0] microseconds if step[0] == ints[1], or always if ints[1] is 0 */
void nap(int32_t lo, int32_t hi, const ft_call *call, int32_t worker) {
  const int32_t *step = call->pointers[0];
  if (call->ints[1] == 0 || step[0] == call->ints[1])
    for (int32_t left = call->ints[0]; left > 0; left -= 10000) usleep(left < 10000 ? left : 10000);
}
