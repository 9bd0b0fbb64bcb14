// What the CPU kernels share: vectors of floats, and numbers of the cache's or the weights' dtype as such.
//
// Defined before this text: one of DTYPE_FLOAT32, DTYPE_BFLOAT16, DTYPE_FLOAT16, INT8_WEIGHTS where weights are int8, and
// WIDE_LANES for kernels that take vectors as long as the machine has them.
// Arithmetic is float32 whatever the dtype.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#if (INT8_WEIGHTS || CODED) && defined(__AVX2__)
#include <immintrin.h>  // compilers widen whole numbers one by one without it; it takes longer to read than all the rest
#endif

namespace {

#if WIDE_LANES && defined(__AVX512BW__)
#define SIXTEEN_LANES 1
constexpr int LANES = 16, STEP = 2 * LANES;
#else
constexpr int LANES = 8, STEP = 2 * LANES;
#endif
typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t vec_int __attribute__((vector_size(4 * LANES)));

// STEP neighbouring dimensions, of which `load_first` and `load_second` give a half each; which lane holds which depends on
// the dtype: dimension d is float number `place(d)`. Of LANES neighbours `widen_lanes` keeps the order.
struct Pair {
  vec first, second;
};

// Memory for some Ts, none of them set yet. Compilers take as long to read <memory> as for a whole kernel.
template <typename T>
struct Buffer {
  T* const at;
  explicit Buffer(int64_t count) : at(new T[count]) {}
  Buffer(const Buffer&) = delete;
  ~Buffer() { delete[] at; }
};

template <typename T, typename S>
inline T read(const S* from) {
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

#if defined(DTYPE_FLOAT32)
using scalar = float;
inline float widen(scalar x) { return x; }
inline scalar narrow(float x) { return x; }
inline vec load_first(const scalar* from) { return read<vec>(from); }
inline vec load_second(const scalar* from) { return read<vec>(from + LANES); }
inline vec widen_lanes(const scalar* from) { return read<vec>(from); }
inline void narrow(vec x, scalar* to) { std::memcpy(to, &x, sizeof x); }
inline int place(int dim) { return dim; }
#elif defined(DTYPE_BFLOAT16)
using scalar = uint16_t;
inline float widen(scalar x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  return read<float>(&bits);
}
inline scalar narrow(float x) {  // to nearest, ties to even
  const uint32_t bits = read<uint32_t>(&x);
  return static_cast<scalar>(x != x ? 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline vec load_first(const scalar* from) {  // the even ones: one instruction
  const vec_int even = read<vec_int>(from) << 16;
  return read<vec>(&even);
}
inline vec load_second(const scalar* from) {  // the odd ones
  const vec_int odd = read<vec_int>(from) & static_cast<int32_t>(0xffff0000);
  return read<vec>(&odd);
}
typedef scalar narrowed __attribute__((vector_size(LANES * sizeof(scalar))));
inline vec widen_lanes(const scalar* from) {
  const vec_int bits = __builtin_convertvector(read<narrowed>(from), vec_int) << 16;
  return read<vec>(&bits);
}
inline void narrow(vec x, scalar* to) {
  typedef uint32_t unsigned_vec __attribute__((vector_size(4 * LANES)));
  const unsigned_vec bits = read<unsigned_vec>(&x), rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const narrowed made = __builtin_convertvector(x != x ? unsigned_vec{} + 0x7fc0 : rounded, narrowed);
  std::memcpy(to, &made, sizeof made);
}
inline int place(int dim) { return dim / STEP * STEP + dim % 2 * LANES + dim % STEP / 2; }
#elif defined(DTYPE_FLOAT16)
using scalar = _Float16;
inline float widen(scalar x) { return static_cast<float>(x); }
inline scalar narrow(float x) { return static_cast<scalar>(x); }
typedef scalar narrowed __attribute__((vector_size(LANES * sizeof(scalar))));
inline vec widen_lanes(const scalar* from) { return __builtin_convertvector(read<narrowed>(from), vec); }
inline vec load_first(const scalar* from) { return widen_lanes(from); }
inline vec load_second(const scalar* from) { return widen_lanes(from + LANES); }
inline void narrow(vec x, scalar* to) {
  const narrowed made = __builtin_convertvector(x, narrowed);
  std::memcpy(to, &made, sizeof made);
}
inline int place(int dim) { return dim; }
#endif

inline Pair load(const scalar* from) { return {load_first(from), load_second(from)}; }

// Whole numbers keep the order, as `widen_lanes` does.
inline vec load_first(const int8_t* from) {
#if INT8_WEIGHTS && defined(__AVX2__)
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
#else
  typedef int8_t int8_lanes __attribute__((vector_size(LANES)));
  return __builtin_convertvector(__builtin_convertvector(read<int8_lanes>(from), vec_int), vec);
#endif
}
inline vec load_second(const int8_t* from) { return load_first(from + LANES); }

// Keeps compilers from loading `x` anew for each of its uses, where loads are what a loop is bound by.
inline void in_register([[maybe_unused]] vec& x) {
#if SIXTEEN_LANES
  asm("" : "+v"(x));
#elif defined(__AVX__)
  asm("" : "+x"(x));
#endif
}

// Adds the products of WIDE vectors in memory, `apart` numbers from one to the next, with ROWS wide ones to their sums:
// one STEP of each. `x` holds the first halves of the rows, then the second.
template <int ROWS, int WIDE, typename T>
inline void add_step(const vec* x, const T* y, int64_t apart, vec (*sums)[ROWS]) {
  for (int half = 0; half < 2; ++half) {
    vec part[WIDE];
    for (int n = 0; n < WIDE; ++n) part[n] = half == 0 ? load_first(y + n * apart) : load_second(y + n * apart);
    for (int m = 0; m < ROWS; ++m) {
      vec row = x[half * ROWS + m];
      if constexpr (WIDE > 1) in_register(row);
      for (int n = 0; n < WIDE; ++n) sums[n][m] += row * part[n];
    }
  }
}

// The numbers that stand eight, four, two lanes or one further on, for sums and the like over all lanes.
#if SIXTEEN_LANES
template <typename Vec>
inline Vec one_on(Vec x) {
  return __builtin_shufflevector(x, x, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
}
template <typename Vec>
inline Vec two_on(Vec x) {
  return __builtin_shufflevector(x, x, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
}
inline vec eight_on(vec x) {
  return __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
}
inline vec four_on(vec x) {
  return __builtin_shufflevector(x, x, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
}

// Neighbours added, of two vectors at once: within each quarter the sums of x, then those of y.
inline vec halved(vec x, vec y) {
  return __builtin_shufflevector(x, y, 0, 2, 16, 18, 4, 6, 20, 22, 8, 10, 24, 26, 12, 14, 28, 30) +
         __builtin_shufflevector(x, y, 1, 3, 17, 19, 5, 7, 21, 23, 9, 11, 25, 27, 13, 15, 29, 31);
}

// Neighbouring quarters added, of two vectors at once.
inline vec quarters(vec x, vec y) {
  return __builtin_shufflevector(x, y, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
         __builtin_shufflevector(x, y, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
}

// The sums of LANES vectors, one in each lane.
inline vec sums_of(const vec* x) {
  vec four[4];
  for (int i = 0; i < 4; ++i)
    four[i] = halved(halved(x[4 * i], x[4 * i + 1]), halved(x[4 * i + 2], x[4 * i + 3]));
  return quarters(quarters(four[0], four[1]), quarters(four[2], four[3]));
}
#else
template <typename Vec>
inline Vec one_on(Vec x) {
  return __builtin_shufflevector(x, x, 1, 0, 3, 2, 5, 4, 7, 6);
}
template <typename Vec>
inline Vec two_on(Vec x) {
  return __builtin_shufflevector(x, x, 2, 3, 0, 1, 6, 7, 4, 5);
}
inline vec four_on(vec x) { return __builtin_shufflevector(x, x, 4, 5, 6, 7, 0, 1, 2, 3); }
inline vec eight_on(vec x) { return x; }

// Neighbours added, of two vectors at once.
inline vec halved(vec x, vec y) {
  return __builtin_shufflevector(x, y, 0, 2, 8, 10, 4, 6, 12, 14) +
         __builtin_shufflevector(x, y, 1, 3, 9, 11, 5, 7, 13, 15);
}

// The sums of LANES vectors, one in each lane.
inline vec sums_of(const vec* x) {
  const vec low = halved(halved(x[0], x[1]), halved(x[2], x[3])), high = halved(halved(x[4], x[5]), halved(x[6], x[7]));
  return __builtin_shufflevector(low, high, 0, 1, 2, 3, 8, 9, 10, 11) +
         __builtin_shufflevector(low, high, 4, 5, 6, 7, 12, 13, 14, 15);
}
#endif

inline float sum_of(vec x) {
  if constexpr (LANES == 16) x += eight_on(x);
  x += four_on(x);
  x += two_on(x);
  return x[0] + x[1];
}

inline vec larger(vec x, vec y) { return x > y ? x : y; }

inline float max_of(vec x) {
  x = larger(x, eight_on(x));
  x = larger(x, four_on(x));
  x = larger(x, two_on(x));
  return std::max(x[0], x[1]);
}

// Asks for `bytes` of memory ahead of their use; any address may be named.
inline void fetch(const void* from, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(static_cast<const char*>(from) + at);
}

}  // namespace
