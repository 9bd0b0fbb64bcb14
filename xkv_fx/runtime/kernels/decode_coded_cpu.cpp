// Decode attention of one token a row over slots of fewer bits, on CPU.
//
// As decode_cpu.cpp, but what is read are codes, which are widened in registers. A group of elements shares a scale and a
// zero, so that its part of a logit is scale * sum(q * code) + zero * sum(q), and its part of the output is
// sum(weight * scale * code) + sum(weight * zero). Codes are of rotated vectors: queries are rotated first, outputs last.
//
// Before this text stand lanes.h, softmax.h, and KEY_DIM, VALUE_DIM, GROUP (query heads for each KV head), KEY_BITS and
// VALUE_BITS (8, 4, or 0 for the dtype itself), KEY_SPAN and VALUE_SPAN (elements that share a scale). Shapes are those of
// the op; every tensor but the mask is contiguous.

namespace {

// Registers for sums, of 32 or of 16: the others hold what is added.
constexpr int KEY_SUMS = LANES == 16 ? 24 : 8, VALUE_SUMS = LANES == 16 ? 24 : VALUE_BITS == 4 ? 8 : 12;
constexpr int AT_ONCE = 4 * GROUP <= KEY_SUMS ? 4 : 2 * GROUP <= KEY_SUMS ? 2 : 1;  // slots that share a pass over the query
constexpr float LARGEST_HALF = 65504.0f;

#if defined(__F16C__)
inline uint16_t half_of(float x) { return _cvtss_sh(x, 0); }
inline float of_half(uint16_t x) { return _cvtsh_ss(x); }
#else
inline uint16_t half_of(float x) {
  const _Float16 half = static_cast<_Float16>(x);
  return read<uint16_t>(&half);
}
inline float of_half(uint16_t x) { return static_cast<float>(read<_Float16>(&x)); }
#endif

// LANES bytes as whole numbers.
inline vec_int widen_bytes(const uint8_t* from) {
#if SIXTEEN_LANES
  return (vec_int)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#elif defined(__AVX2__)
  return (vec_int)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
#else
  typedef uint8_t bytes __attribute__((vector_size(LANES)));
  return __builtin_convertvector(read<bytes>(from), vec_int);
#endif
}

// The lower halves of LANES pairs of float16, as floats.
inline vec lower_halves(vec_int pairs) {
#if SIXTEEN_LANES
  return (vec)_mm512_cvtph_ps(_mm512_cvtepi32_epi16((__m512i)pairs));
#elif defined(__AVX2__) && defined(__F16C__)
  const __m256i lower = (__m256i)(pairs & 0xffff);
  return (vec)_mm256_cvtph_ps(_mm_packus_epi32(_mm256_castsi256_si128(lower), _mm256_extracti128_si256(lower, 1)));
#else
  vec made;
  for (int i = 0; i < LANES; ++i) made[i] = of_half(static_cast<uint16_t>(pairs[i] & 0xffff));
  return made;
#endif
}

// Keys or values as slots hold them.
template <int BITS, int DIM, int SPAN>
struct Stored {
  static constexpr bool IN_CODES = true;
  using element = uint8_t;
  static constexpr int ROW = DIM * BITS / 8;  // elements in memory of a vector
  static constexpr int VECTORS = DIM / LANES, SPANS = DIM / SPAN, OF_SPAN = SPAN / LANES;
  static constexpr int SCALES = 2 * SPANS;  // of a slot, zeros included
  static_assert(SPAN % LANES == 0 && (BITS == 8 || DIM / 2 % LANES == 0));

  // LANES codes of a slot: vector `i` of VECTORS.
  static inline vec load(const element* codes, int i) {
    if constexpr (BITS == 8) return __builtin_convertvector(widen_bytes(codes + i * LANES), vec);
    const bool high = i >= VECTORS / 2;
    const vec_int both = widen_bytes(codes + (high ? i - VECTORS / 2 : i) * LANES);
    return __builtin_convertvector(high ? both >> 4 : both & 15, vec);
  }

  // An order of vectors in which those of the same bytes are neighbours.
  static constexpr int visited(int i) { return BITS == 8 ? i : i % 2 * (VECTORS / 2) + i / 2; }
};

template <int DIM, int SPAN>
struct Stored<0, DIM, SPAN> {
  static constexpr bool IN_CODES = false;
  using element = scalar;
  static constexpr int ROW = DIM, VECTORS = DIM / LANES, SPANS = 1, OF_SPAN = VECTORS, SCALES = 0;
  static_assert(DIM % LANES == 0);
  static inline vec load(const element* numbers, int i) { return widen_lanes(numbers + i * LANES); }
  static constexpr int visited(int i) { return i; }
};

using Keys = Stored<KEY_BITS, KEY_DIM, KEY_SPAN>;
using Values = Stored<VALUE_BITS, VALUE_DIM, VALUE_SPAN>;

struct Asked {  // the rotated and scaled queries of a group
  vec q[Keys::VECTORS][GROUP];
  float sums[GROUP][Keys::SPANS];
  float mean[GROUP];  // what the subtracted mean key would have added to each logit
};

struct Softmax {  // of one query head over a chunk of slots
  Running running;
  vec values[Values::VECTORS];
  float zeros[Values::SPANS];
};

// A Hadamard matrix times each block of a vector, the additions in the order of `quantize.rotate`.
template <int DIM>
void rotate(float* x) {
  constexpr int BLOCK = DIM & -DIM;
  const float root = static_cast<float>(std::sqrt(static_cast<double>(BLOCK)));
  for (int step = 1; step < BLOCK; step *= 2)
    for (int start = 0; start < DIM; start += 2 * step)
      for (int i = start; i < start + step; ++i) {
        const float first = x[i], second = x[i + step];
        x[i] = first + second;
        x[i + step] = first - second;
      }
  for (int i = 0; i < DIM; ++i) x[i] /= root;
}

float bounded(float x, float least, float most) { return x < least ? least : x > most ? most : x; }

// Codes and scales of a vector, to the bit those of `quantize.Coding.encode`. A NaN makes its group's scale and zero NaN.
template <int BITS, int DIM, int SPAN>
void encode(float* x, uint8_t* codes, uint16_t* scales) {
  constexpr float STEPS = (1 << BITS) - 1;
  uint8_t each[DIM];
  rotate<DIM>(x);
  for (int start = 0; start < DIM; start += SPAN, scales += 2) {
    float low = x[start], high = x[start];
    for (int i = start; i < start + SPAN; ++i) {
      if (x[i] < low || x[i] != x[i]) low = x[i];
      if (x[i] > high || x[i] != x[i]) high = x[i];
    }
    scales[1] = half_of(bounded(low, -LARGEST_HALF, LARGEST_HALF));
    const float zero = of_half(scales[1]);
    scales[0] = half_of(bounded((high - zero) / STEPS, 0.0f, LARGEST_HALF));
    const float scale = of_half(scales[0]), divisor = scale > 0.0f ? scale : 1.0f;
    for (int i = start; i < start + SPAN; ++i) {
      const float code = std::nearbyint((x[i] - zero) / divisor);
      each[i] = code > 0.0f ? static_cast<uint8_t>(std::min(code, STEPS)) : 0;
    }
  }
  for (int i = 0; i < DIM * BITS / 8; ++i) codes[i] = BITS == 8 ? each[i] : each[i] | each[i + DIM / 2] << 4;
}

// Stores a vector in a slot, less the mean if any, which is taken off in the dtype.
template <int BITS, int DIM, int SPAN>
void store(const scalar* from, const float* mean, typename Stored<BITS, DIM, SPAN>::element* to, uint16_t* scales) {
  scalar numbers[DIM];
  std::memcpy(numbers, from, sizeof numbers);
  if (mean != nullptr)
    for (int d = 0; d < DIM; ++d) numbers[d] = narrow(widen(numbers[d]) - widen(narrow(mean[d])));
  if constexpr (BITS == 0) {
    std::memcpy(to, numbers, sizeof numbers);
  } else {
    float x[DIM];
    for (int d = 0; d < DIM; ++d) x[d] = widen(numbers[d]);
    encode<BITS, DIM, SPAN>(x, to, scales);
  }
}

void ask(const scalar* q, const float* mean, float scale, Asked& asked) {
  for (int g = 0; g < GROUP; ++g) {
    float x[KEY_DIM], of_mean = 0.0f;
    for (int d = 0; d < KEY_DIM; ++d) {
      x[d] = widen(q[g * KEY_DIM + d]) * scale;
      if (mean != nullptr) of_mean += x[d] * mean[d];
    }
    asked.mean[g] = of_mean;
    if constexpr (Keys::IN_CODES) rotate<KEY_DIM>(x);
    for (int i = 0; i < Keys::VECTORS; ++i) asked.q[i][g] = read<vec>(x + i * LANES);
    for (int j = 0; j < Keys::SPANS; ++j) {
      vec sum = {};
      for (int i = 0; i < Keys::OF_SPAN; ++i) sum += asked.q[j * Keys::OF_SPAN + i][g];
      asked.sums[g][j] = sum_of(sum);
    }
  }
}

// The scales and zeros of `count` slots, 0 behind them.
template <int SPANS>
void read_scales(const uint16_t* scales, int64_t count, float (*scale)[TILE], float (*zero)[TILE]) {
  for (int j = 0; j < SPANS; ++j) {
    alignas(64) uint32_t pairs[TILE] = {};
    if constexpr (SPANS == 1) std::memcpy(pairs, scales, count * sizeof *pairs);
    else
      for (int64_t s = 0; s < count; ++s) std::memcpy(pairs + s, scales + (s * SPANS + j) * 2, sizeof *pairs);
    for (int64_t s = 0; s < TILE; s += LANES) {
      const vec_int both = read<vec_int>(pairs + s);
      const vec first = lower_halves(both), second = lower_halves(both >> 16);
      std::memcpy(scale[j] + s, &first, sizeof first);
      std::memcpy(zero[j] + s, &second, sizeof second);
    }
  }
}

// Dot products of the group's queries with the codes of COUNT neighbouring keys: sums that are still to be added up,
// `apart` vectors from one head to the next. Scales of several spans are in them, that of a single one is not.
template <int COUNT>
inline void dot_keys(const Asked& asked, const Keys::element* k, const float (*scale)[TILE], int64_t s, vec* parts, int64_t apart) {
  vec sums[COUNT][GROUP] = {};
  for (int j = 0; j < Keys::SPANS; ++j) {
    vec of_span[COUNT][GROUP] = {};
#pragma GCC unroll 16
    for (int n = 0; n < Keys::OF_SPAN; ++n) {
      const int i = Keys::SPANS == 1 ? Keys::visited(n) : j * Keys::OF_SPAN + n;
      vec key[COUNT];
#pragma GCC unroll 4
      for (int c = 0; c < COUNT; ++c) key[c] = Keys::load(k + (s + c) * Keys::ROW, i);
#pragma GCC unroll 64
      for (int g = 0; g < GROUP; ++g) {
        vec query = asked.q[i][g];
        if constexpr (COUNT > 1) in_register(query);
#pragma GCC unroll 4
        for (int c = 0; c < COUNT; ++c) of_span[c][g] += query * key[c];
      }
    }
#pragma GCC unroll 4
    for (int c = 0; c < COUNT; ++c)
#pragma GCC unroll 64
      for (int g = 0; g < GROUP; ++g)
        sums[c][g] = Keys::SPANS == 1 ? of_span[c][g] : sums[c][g] + of_span[c][g] * scale[j][s + c];
  }
  for (int g = 0; g < GROUP; ++g)
    for (int c = 0; c < COUNT; ++c) parts[g * apart + c] = sums[c][g];
}

// Logits of `count` keys; the tile's values are asked for meanwhile.
void dot(const Asked& asked, const Keys::element* k, const uint16_t* k_scales, const Values::element* v, int64_t count,
         float (*logits)[TILE]) {
  alignas(64) float scale[Keys::SPANS][TILE], zero[Keys::SPANS][TILE];
  if constexpr (Keys::IN_CODES) read_scales<Keys::SPANS>(k_scales, count, scale, zero);
  for (int64_t s = 0; s < count; s += LANES) {
    fetch(v + s * Values::ROW, LANES * Values::ROW * sizeof *v);
    vec parts[GROUP][LANES];
    if (s + LANES <= count) {
      for (int i = 0; i < LANES; i += AT_ONCE) dot_keys<AT_ONCE>(asked, k, scale, s + i, &parts[0][i], LANES);
    } else {
      std::memset(parts, 0, sizeof parts);
      for (int64_t i = 0; i < count - s; ++i) dot_keys<1>(asked, k, scale, s + i, &parts[0][i], LANES);
    }
    for (int g = 0; g < GROUP; ++g) {
      vec several = sums_of(parts[g]);
      if constexpr (Keys::IN_CODES) {
        if constexpr (Keys::SPANS == 1) several *= read<vec>(scale[0] + s);
        for (int j = 0; j < Keys::SPANS; ++j) several += read<vec>(zero[j] + s) * asked.sums[g][j];
      }
      several += asked.mean[g];
      std::memcpy(&logits[g][s], &several, sizeof several);
    }
  }
}

// Values are summed BLOCK vectors of all heads at a time.
constexpr int block_of(int vectors, int least) {
  int block = least;
  for (int size = least; size <= vectors; size += least)
    if (vectors % size == 0 && size * GROUP <= VALUE_SUMS) block = size;
  return block;
}
constexpr int BLOCK = block_of(Values::VECTORS, VALUE_BITS == 4 ? 2 : 1);

// Adds the weighted values of `count` slots to each head of the group; the next tile's keys are asked for meanwhile.
template <int FIRST = 0>
inline void add_values(const float (*weights)[Values::SPANS][TILE], const Values::element* v, const Keys::element* next_k,
                       int64_t count, Softmax* heads) {
  constexpr int64_t ASKED = Keys::ROW * sizeof *next_k * BLOCK / Values::VECTORS;
  const char* ahead = reinterpret_cast<const char*>(next_k) + count * FIRST / BLOCK * ASKED;
  vec sums[BLOCK][GROUP] = {};
  for (int64_t s = 0; s < count; ++s, ahead += ASKED) {
    fetch(ahead, ASKED);
#pragma GCC unroll 32
    for (int n = 0; n < BLOCK; ++n) {
      const int i = Values::visited(FIRST + n);
      const vec value = Values::load(v + s * Values::ROW, i);
#pragma GCC unroll 64
      for (int g = 0; g < GROUP; ++g) sums[n][g] += weights[g][i / Values::OF_SPAN][s] * value;
    }
  }
#pragma GCC unroll 32
  for (int n = 0; n < BLOCK; ++n)
#pragma GCC unroll 64
    for (int g = 0; g < GROUP; ++g) heads[g].values[Values::visited(FIRST + n)] += sums[n][g];
  if constexpr (FIRST + BLOCK < Values::VECTORS) add_values<FIRST + BLOCK>(weights, v, next_k, count, heads);
}

// Weights times scales, for each span of elements; the zeros are added up here.
inline void weigh(const float* weights, const float (*scale)[TILE], const float (*zero)[TILE], float (*scaled)[TILE],
                  Softmax& head) {
  for (int j = 0; j < Values::SPANS; ++j) {
    vec zeros = {};
    for (int64_t s = 0; s < TILE; s += LANES) {
      const vec weight = read<vec>(weights + s), made = weight * read<vec>(scale[j] + s);
      std::memcpy(scaled[j] + s, &made, sizeof made);
      zeros += weight * read<vec>(zero[j] + s);
    }
    head.zeros[j] += sum_of(zeros);
  }
}

void attend_chunk(const Asked& asked, const Keys::element* k, const uint16_t* k_scales, const Values::element* v,
                  const uint16_t* v_scales, const scalar* mask, int64_t slots, float softcap, Softmax* heads) {
  for (int g = 0; g < GROUP; ++g) heads[g] = {{NOTHING, 0.0f}, {}, {}};
  alignas(64) float weights[GROUP][TILE], shown[TILE], scaled[GROUP][Values::SPANS][TILE];
  alignas(64) float scale[Values::SPANS][TILE], zero[Values::SPANS][TILE];
  for (int64_t start = 0; start < slots; start += TILE) {
    const int64_t count = std::min(TILE, slots - start);
    const Keys::element* keys = k + start * Keys::ROW;
    const Values::element* values = v + start * Values::ROW;
    dot(asked, keys, k_scales + start * Keys::SCALES, values, count, weights);
    show(mask + start, count, shown);
    if constexpr (Values::IN_CODES) read_scales<Values::SPANS>(v_scales + start * Values::SCALES, count, scale, zero);
    for (int g = 0; g < GROUP; ++g) {
      const float shrink = softmax(weights[g], shown, count, softcap, heads[g].running);
      if (shrink != 1.0f) {
        for (vec& value : heads[g].values) value *= shrink;
        for (float& zeros : heads[g].zeros) zeros *= shrink;
      }
      if constexpr (Values::IN_CODES) weigh(weights[g], scale, zero, scaled[g], heads[g]);
      else std::memcpy(scaled[g], weights[g], sizeof weights[g]);
    }
    add_values(scaled, values, keys + count * Keys::ROW, count, heads);
  }
  for (int g = 0; g < GROUP; ++g)
    for (int i = 0; i < Values::VECTORS; ++i) heads[g].values[i] += heads[g].zeros[i / Values::OF_SPAN];
}

// The output of a query head from its parts, one of each chunk.
void merge(const Softmax* parts, int64_t chunks, float sink, scalar* out) {
  float maximum = sink;
  for (int64_t c = 0; c < chunks; ++c) maximum = std::max(maximum, parts[c * GROUP].running.maximum);
  float sum = sink == NOTHING ? 0.0f : std::exp(sink - maximum);
  vec values[Values::VECTORS] = {};
  for (int64_t c = 0; c < chunks; ++c) {
    const Softmax& part = parts[c * GROUP];
    const float weight = std::exp(part.running.maximum - maximum);
    sum += part.running.sum * weight;
    for (int i = 0; i < Values::VECTORS; ++i) values[i] += part.values[i] * weight;
  }
  float whole[VALUE_DIM];
  std::memcpy(whole, values, sizeof whole);
  if constexpr (Values::IN_CODES) rotate<VALUE_DIM>(whole);
  for (int d = 0; d < VALUE_DIM; ++d) out[d] = narrow(whole[d] / sum);
}

}  // namespace

// `mask_row` and `mask_head` are the mask's strides. Returns 1, with nothing written, for a slot outside the cache.
extern "C" int xkv_decode_coded(const scalar* q, const scalar* k, const scalar* v, Keys::element* k_cache,
                                uint16_t* k_scales, Values::element* v_cache, uint16_t* v_scales, const int64_t* slot,
                                const scalar* mask, const float* sinks, const float* key_mean, scalar* out, int64_t rows,
                                int64_t kv_heads, int64_t slots, int64_t mask_row, int64_t mask_head, float scale,
                                float softcap, int threads) {
  for (int64_t row = 0; row < rows; ++row)
    if (slot[row] < 0 || slot[row] >= slots) return 1;
  const int64_t heads = rows * kv_heads, chunks = (slots + CHUNK - 1) / CHUNK;
  const Buffer<Asked> asked(heads);
  const Buffer<Softmax> parts(heads * chunks * GROUP);
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int64_t head = 0; head < heads; ++head) {
      const int64_t at = head * slots + slot[head / kv_heads];
      const float* mean = key_mean == nullptr ? nullptr : key_mean + head % kv_heads * KEY_DIM;
      store<KEY_BITS, KEY_DIM, KEY_SPAN>(k + head * KEY_DIM, mean, k_cache + at * Keys::ROW, k_scales + at * Keys::SCALES);
      store<VALUE_BITS, VALUE_DIM, VALUE_SPAN>(v + head * VALUE_DIM, nullptr, v_cache + at * Values::ROW,
                                               v_scales + at * Values::SCALES);
      ask(q + head * GROUP * KEY_DIM, mean, scale, asked.at[head]);
    }
#pragma omp for schedule(static)
    for (int64_t task = 0; task < heads * chunks; ++task) {
      const int64_t head = task / chunks, start = task % chunks * CHUNK, at = head * slots + start;
      attend_chunk(asked.at[head], k_cache + at * Keys::ROW, k_scales + at * Keys::SCALES, v_cache + at * Values::ROW,
                   v_scales + at * Values::SCALES, mask + head / kv_heads * mask_row + head % kv_heads * mask_head + start,
                   std::min(CHUNK, slots - start), softcap, parts.at + task * GROUP);
    }
#pragma omp for schedule(static)
    for (int64_t query = 0; query < heads * GROUP; ++query)
      merge(parts.at + query / GROUP * chunks * GROUP + query % GROUP, chunks,
            sinks == nullptr ? NOTHING : sinks[query % (kv_heads * GROUP)], out + query * VALUE_DIM);
  }
  return 0;
}
