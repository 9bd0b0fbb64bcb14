// Linear layers of one input of a few rows, on CPU: each weight is read from memory once, as it lies, whatever the number of rows.
//
// One token a row leaves a decode step little to do but to read the weights; from a few rows on, in bfloat16, it is bound
// by arithmetic as much. So a tile of AT_ONCE rows and OUTPUTS outputs keeps all its sums in registers: each weight
// is widened once for the rows of a tile, and each input is loaded once for its outputs. Tiles of further rows find
// their weights in the cache, a block of outputs at a time, while the next block is asked for. Sums are float32 whatever
// the dtype.
//
// Before this text stands lanes.h, and INT8_WEIGHTS where the weights are int8, whatever the dtype of the
// input; whoever calls has them scaled. The input is `[rows, depth]`, the weights of a layer `[width, depth]`, its output
// `[rows, width]`, all contiguous; `depth` is a multiple of STEP.

namespace {

#if INT8_WEIGHTS
using weight = int8_t;
#else
using weight = scalar;
#endif
constexpr int64_t AT_ONCE = 4, OUTPUTS = 2;
constexpr int64_t BLOCK = 16;  // outputs
static_assert(AT_ONCE * OUTPUTS <= LANES && BLOCK % OUTPUTS == 0);

// Rows dealt out evenly to as few tiles as will do.
struct Rows {
  int64_t all, tiles;
  int64_t start(int64_t tile) const { return tile * all / tiles; }
  int64_t count(int64_t tile) const { return start(tile + 1) - start(tile); }
};

// The input as vectors of floats: tile by tile, in each the steps, in each the first halves of its rows, then the second.
void widen_all(const scalar* x, const Rows& rows, int64_t steps, vec* to) {
  for (int64_t tile = 0; tile < rows.tiles; ++tile) {
    const int64_t count = rows.count(tile);
    for (int64_t d = 0; d < steps; ++d, to += 2 * count)
      for (int64_t m = 0; m < count; ++m) {
        const scalar* from = x + ((rows.start(tile) + m) * steps + d) * STEP;
        to[m] = INT8_WEIGHTS ? widen_lanes(from) : load_first(from);  // in the order of the weights
        to[count + m] = INT8_WEIGHTS ? widen_lanes(from + LANES) : load_second(from);
      }
  }
}

// What a block's steps ask for while they work: the block behind it, line by line.
struct Ahead {
  static constexpr int64_t BYTES = OUTPUTS * STEP * sizeof(weight), LINES = std::max<int64_t>(BYTES / 64, 1);
  const char* at;
  int64_t tiles;
  int64_t stride = BYTES / LINES / tiles;
  inline void fetch_next() {
    for (int64_t i = 0; i < LINES; ++i, at += stride) __builtin_prefetch(at);
  }
};

// ROWS x WIDE results.
template <int ROWS, int WIDE>
void tile(const vec* x, const weight* weights, int64_t steps, const scalar* bias, scalar* out, int64_t width,
          Ahead& ahead) {
  vec sums[WIDE][ROWS] = {};
  for (int64_t d = 0; d < steps; ++d, x += 2 * ROWS) {
    ahead.fetch_next();
    add_step<ROWS, WIDE>(x, weights + d * STEP, steps * STEP, sums);
  }
  vec all[LANES];
#pragma GCC unroll 8
  for (int i = 0; i < LANES; ++i) all[i] = i < ROWS * WIDE ? sums[i / ROWS][i % ROWS] : vec{};
  vec added = sums_of(all);
  if (bias != nullptr)
    for (int i = 0; i < ROWS * WIDE; ++i) added[i] += widen(bias[i / ROWS]);
  scalar results[LANES];
  narrow(added, results);
  for (int i = 0; i < ROWS * WIDE; ++i) out[i % ROWS * width + i / ROWS] = results[i];
}

template <int WIDE, int ROWS = AT_ONCE>
inline void tile_of(int64_t rows, const vec* x, const weight* weights, int64_t steps, const scalar* bias, scalar* out,
                    int64_t width, Ahead& ahead) {
  if (rows == ROWS) return tile<ROWS, WIDE>(x, weights, steps, bias, out, width, ahead);
  if constexpr (ROWS > 1) tile_of<WIDE, ROWS - 1>(rows, x, weights, steps, bias, out, width, ahead);
}

}  // namespace

// `layers` layers: `weights`, `widths` and, where they have any, `biases` of each; their outputs stand one after another.
extern "C" void xkv_linear(const scalar* x, const weight* const* weights, const scalar* const* biases, scalar* out,
                           const int64_t* widths, int64_t layers, int64_t all_rows, int64_t depth, int threads) {
  const int64_t steps = depth / STEP;
  const Rows rows{all_rows, (all_rows + AT_ONCE - 1) / AT_ONCE};
  const auto blocks_of = [&](int64_t layer) { return (widths[layer] + BLOCK - 1) / BLOCK; };
  int64_t blocks = 0;
  for (int64_t layer = 0; layer < layers; ++layer) blocks += blocks_of(layer);
#pragma omp parallel num_threads(threads)
  {
    const Buffer<vec> inputs(rows.all * steps * 2);  // each thread its own: quicker than to wait for one
    widen_all(x, rows, steps, inputs.at);
#pragma omp for schedule(static)
    for (int64_t block = 0; block < blocks; ++block) {
      int64_t layer = 0, number = block;
      scalar* to = out;
      for (; number >= blocks_of(layer); ++layer) {
        number -= blocks_of(layer);
        to += widths[layer] * rows.all;
      }
      const int64_t start = number * BLOCK, width = widths[layer], end = std::min(start + BLOCK, width);
      const bool last = end == width && layer + 1 < layers;
      const weight* next = last ? weights[layer + 1] : weights[layer] + end * depth;
      Ahead ahead{reinterpret_cast<const char*>(next), rows.tiles};
      for (int64_t of = 0; of < rows.tiles; ++of) {
        const int64_t row = rows.start(of);
        for (int64_t n = start; n < end; n += OUTPUTS) {
          const auto made = n + OUTPUTS <= end ? tile_of<OUTPUTS> : tile_of<1>;
          made(rows.count(of), inputs.at + row * steps * 2, weights[layer] + n * depth, steps,
               biases == nullptr ? nullptr : biases[layer] + n, to + row * width + n, width, ahead);
        }
      }
    }
  }
}
