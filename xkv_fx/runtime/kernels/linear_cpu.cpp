// A linear layer over a few rows, on CPU: each weight is read once, as it lies, whatever the number of rows.
//
// One token a row leaves a decode step little to do but to read the weights. Outputs are dealt out to threads in
// stretches, so that each thread reads one stretch of memory from end to end. Sums are float32 whatever the dtype.
//
// Before this text stands lanes.h. The input is `[rows, depth]`, the weights `[width, depth]`, the output `[rows, width]`,
// all contiguous; `depth` is a multiple of STEP.

namespace {

constexpr int64_t AHEAD = 4096;  // bytes between what is read and what is asked for

// ROWS x OUTPUTS results; `x` holds `steps` pairs a row.
template <int ROWS, int OUTPUTS>
void tile(const Pair* x, const scalar* weights, int64_t steps, const scalar* bias, scalar* out, int64_t width) {
  vec sums[OUTPUTS][ROWS] = {};
  for (int64_t d = 0; d < steps; ++d) {
    Pair part[OUTPUTS];
    for (int n = 0; n < OUTPUTS; ++n) {
      const scalar* from = weights + (n * steps + d) * STEP;
      __builtin_prefetch(reinterpret_cast<const char*>(from) + AHEAD);
      part[n] = load(from);
    }
    for (int m = 0; m < ROWS; ++m)
      for (int n = 0; n < OUTPUTS; ++n) sums[n][m] += x[m * steps + d].first * part[n].first;
    for (int m = 0; m < ROWS; ++m)
      for (int n = 0; n < OUTPUTS; ++n) sums[n][m] += x[m * steps + d].second * part[n].second;
  }
  float added[ROWS * OUTPUTS];
  if constexpr (ROWS * OUTPUTS == LANES) {
    const vec eight = sums_of(&sums[0][0]);
    std::memcpy(added, &eight, sizeof eight);
  } else {
    for (int i = 0; i < ROWS * OUTPUTS; ++i) added[i] = sum_of(sums[i / ROWS][i % ROWS]);
  }
  if (bias != nullptr)
    for (int i = 0; i < ROWS * OUTPUTS; ++i) added[i] += widen(bias[i / ROWS]);
  scalar results[ROWS * OUTPUTS];
  for (int i = 0; i < ROWS * OUTPUTS; ++i) results[i] = narrow(added[i]);
  for (int i = 0; i < ROWS * OUTPUTS; ++i) out[i % ROWS * width + i / ROWS] = results[i];
}

template <int OUTPUTS, int ROWS = LANES / OUTPUTS>
void last_rows(int64_t rows, const Pair* x, const scalar* weights, int64_t steps, const scalar* bias, scalar* out,
               int64_t width) {
  if (rows == ROWS) return tile<ROWS, OUTPUTS>(x, weights, steps, bias, out, width);
  if constexpr (ROWS > 1) last_rows<OUTPUTS, ROWS - 1>(rows, x, weights, steps, bias, out, width);
}

// OUTPUTS neighbouring outputs of every row.
template <int OUTPUTS>
void all_rows(int64_t rows, const Pair* x, const scalar* weights, int64_t steps, const scalar* bias, scalar* out,
              int64_t width) {
  constexpr int64_t at_once = LANES / OUTPUTS;
  for (int64_t row = 0; row < rows; row += at_once)
    last_rows<OUTPUTS>(std::min(at_once, rows - row), x + row * steps, weights, steps, bias, out + row * width, width);
}

}  // namespace

extern "C" void xkv_linear(const scalar* x, const scalar* weights, const scalar* bias, scalar* out, int64_t rows,
                           int64_t depth, int64_t width, int threads) {
  const int64_t steps = depth / STEP;
  const std::unique_ptr<Pair[]> widened(new Pair[rows * steps]);
  for (int64_t i = 0; i < rows * steps; ++i) widened[i] = load(x + i * STEP);
  const Pair* inputs = widened.get();
  const int64_t at_once = rows <= LANES ? 1 : 2;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t block = 0; block < width / at_once; ++block) {
    const int64_t n = block * at_once;
    const scalar* of = bias == nullptr ? nullptr : bias + n;
    if (at_once == 1) {
      all_rows<1>(rows, inputs, weights + n * depth, steps, of, out + n, width);
    } else {
      all_rows<2>(rows, inputs, weights + n * depth, steps, of, out + n, width);
    }
  }
  if (width % at_once != 0) {
    const int64_t n = width - 1;
    all_rows<1>(rows, inputs, weights + n * depth, steps, bias == nullptr ? nullptr : bias + n, out + n, width);
  }
}
