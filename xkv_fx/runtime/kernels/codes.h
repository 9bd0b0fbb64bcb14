// How slots of fewer bits are written and what they hold: codes, scales and zeros, to the bit those of `quantize.Coding`.
//
// Before this text stands lanes.h.

namespace {

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

// Whole numbers of a byte.
inline void put_bytes(vec_int numbers, uint8_t* to) {
#if SIXTEEN_LANES
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8((__m512i)numbers));
#else
  for (int i = 0; i < LANES; ++i) to[i] = static_cast<uint8_t>(numbers[i]);
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

// Memory for DIM numbers, and for what vectors reach behind them.
template <int DIM>
constexpr int PADDED = (DIM + LANES - 1) / LANES * LANES + LANES;

// A Hadamard matrix times each block of a vector, the additions in the order of `quantize.rotate`.
template <int DIM>
void rotate(float (&x)[PADDED<DIM>]) {
  constexpr int BLOCK = DIM & -DIM;
  const float root = static_cast<float>(std::sqrt(static_cast<double>(BLOCK)));
  for (int step = LANES; step < BLOCK; step *= 2)
    for (int start = 0; start < DIM; start += 2 * step)
      for (int i = start; i < start + step; i += LANES) {
        const vec first = read<vec>(x + i), second = read<vec>(x + i + step), sum = first + second, rest = first - second;
        std::memcpy(x + i, &sum, sizeof sum);
        std::memcpy(x + i + step, &rest, sizeof rest);
      }
  vec sign[4];
  for (int i = 0; i < LANES; ++i)
    for (int bit = 0; bit < 4; ++bit) sign[bit][i] = i >> bit & 1 ? -1.0f : 1.0f;
  for (int i = 0; i < DIM; i += LANES) {
    vec each = read<vec>(x + i);
    if constexpr (BLOCK > 1) each = one_on(each) + each * sign[0];
    if constexpr (BLOCK > 2) each = two_on(each) + each * sign[1];
    if constexpr (BLOCK > 4) each = four_on(each) + each * sign[2];
    if constexpr (BLOCK > 8 && LANES > 8) each = eight_on(each) + each * sign[3];
    each /= root;
    std::memcpy(x + i, &each, sizeof each);
  }
}

inline float bounded(float x, float least, float most) { return x < least ? least : x > most ? most : x; }

// The least and the largest of SPAN numbers, NaN both where one of them is.
template <int SPAN>
void range_of(const float* x, float& low, float& high) {
  static_assert(SPAN % 8 == 0);
  vec least, most;
  vec_int wrong = {};
  for (int i = 0; i < SPAN; i += LANES) {
    vec each;
    for (int part = 0; part < LANES; part += 8)  // the last ones are read again where vectors reach further
      std::memcpy(reinterpret_cast<float*>(&each) + part, x + std::min(i + part, SPAN - 8), 8 * sizeof *x);
    least = i == 0 ? each : each < least ? each : least;
    most = i == 0 ? each : each > most ? each : most;
    wrong |= each != each;
  }
  low = -max_of(-least), high = max_of(most);
  for (int i = 0; i < LANES; ++i)
    if (wrong[i] != 0) low = high = std::numeric_limits<float>::quiet_NaN();
}

// Codes and scales of a vector. A NaN makes its group's scale and zero NaN.
template <int BITS, int DIM, int SPAN>
void encode(float (&x)[PADDED<DIM>], uint8_t* codes, uint16_t* scales) {
  constexpr float STEPS = (1 << BITS) - 1, ROUNDING = 12582912.0f;  // 1.5 * 2^23: sums with it have no fraction
  uint8_t each[PADDED<DIM>];
  rotate<DIM>(x);
  for (int start = 0; start < DIM; start += SPAN, scales += 2) {
    float low, high;
    range_of<SPAN>(x + start, low, high);
    scales[1] = half_of(bounded(low, -LARGEST_HALF, LARGEST_HALF));
    const float zero = of_half(scales[1]);
    scales[0] = half_of(bounded((high - zero) / STEPS, 0.0f, LARGEST_HALF));
    const float scale = of_half(scales[0]), divisor = scale > 0.0f ? scale : 1.0f;
    for (int i = start; i < start + SPAN; i += LANES) {
      vec code = (read<vec>(x + i) - zero) / divisor;
      code = code > 0.0f ? code : vec{};
      code = (code < STEPS ? code : vec{} + STEPS) + ROUNDING;
      put_bytes(__builtin_convertvector(code - ROUNDING, vec_int), each + i);
    }
  }
  for (int i = 0; i < DIM * BITS / 8; ++i) codes[i] = BITS == 8 ? each[i] : each[i] | each[i + DIM / 2] << 4;
}

// Stores a vector in a slot, less the mean if any, which is taken off in the dtype.
template <typename Stored>
void store(const scalar* from, const float* mean, typename Stored::element* to, uint16_t* scales) {
  constexpr int DIM = Stored::SIZE;
  scalar numbers[DIM];
  std::memcpy(numbers, from, sizeof numbers);
  if (mean != nullptr)
    for (int d = 0; d < DIM; ++d) numbers[d] = narrow(widen(numbers[d]) - widen(narrow(mean[d])));
  if constexpr (Stored::IN_CODES) {
    float x[PADDED<DIM>] = {};
    for (int d = 0; d < DIM; ++d) x[d] = widen(numbers[d]);
    encode<Stored::CODE_BITS, DIM, Stored::SPAN>(x, to, scales);
  } else {
    std::memcpy(to, numbers, sizeof numbers);
  }
}

// The scales and zeros of `count` slots, of each of SPANS spans; 0 behind them, up to a multiple of LANES.
template <int SPANS, int64_t LENGTH>
void read_scales(const uint16_t* scales, int64_t count, float (*scale)[LENGTH], float (*zero)[LENGTH]) {
  for (int j = 0; j < SPANS; ++j)
    for (int64_t s = 0; s < count; s += LANES) {
      vec_int both = {};
      const uint16_t* from = scales + (s * SPANS + j) * 2;
      if (SPANS == 1 && s + LANES <= count) both = read<vec_int>(from);
      else
        for (int64_t i = 0; i < LANES && s + i < count; ++i) both[i] = read<int32_t>(from + i * SPANS * 2);
      const vec first = lower_halves(both), second = lower_halves(both >> 16);
      std::memcpy(scale[j] + s, &first, sizeof first);
      std::memcpy(zero[j] + s, &second, sizeof second);
    }
}

}  // namespace
