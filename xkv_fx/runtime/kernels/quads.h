// Codes four at a time, and numbers that multiply them.
//
// A quad is four codes in one lane of a vector: four neighbouring elements of a key, or one element in four neighbouring
// slots. What they are multiplied with, queries and weights, is made whole numbers first: of 16 bits, and of 24 for float32,
// which is what its own fraction holds. Instructions that multiply the numbers of a lane and add up the products then sum
// over codes that were never widened, with no sum across lanes afterwards.
//
// Before this text stand lanes.h and codes.h.

namespace {

// What stands beside codes, for four of them: DIGITS times WORDS lanes.
#if (SIXTEEN_LANES && defined(__AVX512VNNI__)) || (!SIXTEEN_LANES && defined(__AVXVNNI__))
// Digits of a byte: the processor multiplies four bytes with four codes.
#define BYTE_DIGITS 1
constexpr int DIGITS = sizeof(scalar) == 4 ? 3 : 2, WORDS = 1;
constexpr int32_t LARGEST = DIGITS == 3 ? 0x7f7f00 : 0x7f70;  // what rounds to a little more still has these digits
#elif defined(__AVX2__) && !defined(DTYPE_FLOAT32)
// Half a lane: the processor multiplies two halves with two codes.
#define HALF_DIGITS 1
constexpr int DIGITS = 1, WORDS = 2;
constexpr int32_t LARGEST = 0x7ff0;
#else
// A float each.
constexpr int DIGITS = 1, WORDS = 4;
constexpr int32_t LARGEST = 1;
#endif
constexpr int64_t BLOCK = 64;  // the most products of a code with a digit that are added up: below 2^31

#if BYTE_DIGITS || HALF_DIGITS
using Digit = int32_t;
typedef vec_int vec_sum;
#else
using Digit = float;
typedef vec vec_sum;
#endif

typedef uint8_t piece __attribute__((vector_size(16)));

inline vec_int read_quads(const uint32_t* from) { return read<vec_int>(from); }
inline void write_quads(vec_int quads, uint32_t* to) { std::memcpy(to, &quads, sizeof quads); }

// A quad's codes as they are multiplied: all as they lie, the first and third or the second and fourth, or one as a float.
inline vec_sum part_of(vec_int quads, int word) {
#if BYTE_DIGITS
  return quads;
#elif HALF_DIGITS
  typedef uint16_t halves __attribute__((vector_size(4 * LANES)));
  return word == 0 ? quads & 0x00ff00ff : (vec_int)((halves)quads >> 8);
#else
  return __builtin_convertvector((quads >> (8 * word)) & 0xff, vec);
#endif
}

// Adds the products of a part of each quad with the same digits.
inline void multiply_add(vec_sum& sum, vec_sum part, Digit digit) {
#if BYTE_DIGITS && SIXTEEN_LANES
  sum = (vec_int)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)part, _mm512_set1_epi32(digit));
#elif BYTE_DIGITS
  sum = (vec_int)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)part, _mm256_set1_epi32(digit));
#elif HALF_DIGITS && SIXTEEN_LANES
  sum += (vec_int)_mm512_madd_epi16((__m512i)part, _mm512_set1_epi32(digit));
#elif HALF_DIGITS
  sum += (vec_int)_mm256_madd_epi16((__m256i)part, _mm256_set1_epi32(digit));
#else
  sum += part * digit;
#endif
}

// The sum of products with whole numbers, from those with their digits.
inline vec sum_of_digits(const vec_sum* sums) {
  vec whole = __builtin_convertvector(sums[DIGITS - 1], vec);
  for (int d = DIGITS - 1; d-- > 0;) whole = whole * 256.0f + __builtin_convertvector(sums[d], vec);
  return whole;
}

// The digits of COUNT numbers, APART lanes from four of them to the next four.
constexpr int APART = LANES == 16 && WORDS == 1 ? 1 : 4;
template <int COUNT>
using Digits = Digit[DIGITS][(COUNT + LANES - 1) / LANES * LANES / 4 * APART];

// Puts down the digits of LANES numbers of up to LARGEST, `n` and those behind it. Returns what was rounded off.
template <int LENGTH>
inline vec put_digits(vec numbers, int64_t n, Digit (&to)[DIGITS][LENGTH]) {
#if BYTE_DIGITS || HALF_DIGITS
#if SIXTEEN_LANES
  vec_int wholes = (vec_int)_mm512_cvtps_epi32((__m512)numbers);
#else
  vec_int wholes = (vec_int)_mm256_cvtps_epi32((__m256)numbers);
#endif
  const vec rest = numbers - __builtin_convertvector(wholes, vec);
  for (int d = 0; d < DIGITS; ++d, wholes = (wholes + 128) >> 8) {  // a digit is signed; of each, the last byte is put down
    Digit* at = to[d] + n / 4 * APART;
#if BYTE_DIGITS && SIXTEEN_LANES
    put_bytes(wholes, reinterpret_cast<uint8_t*>(at));
#else
#if BYTE_DIGITS
    const vec_int two = (wholes & 0xff) | one_on(wholes & 0xff) << 8, words = two | two_on(two) << 16;
#else
    const vec_int words = (wholes & 0xffff) | two_on(wholes) << 16;
#endif
    std::memcpy(at, &words, sizeof words);
#endif
  }
  return rest;
#else
  std::memcpy(to[0] + n, &numbers, sizeof numbers);
  return vec{};
#endif
}

// A vector of LANES / 4 pieces, `apart` bytes from one to the next, of which BYTES are read.
template <int BYTES>
inline vec_int pieces(const uint8_t* from, int64_t apart) {
  piece each[LANES / 4] = {};
  for (int i = 0; i < LANES / 4; ++i) std::memcpy(&each[i], from + i * apart, BYTES);
#if SIXTEEN_LANES
  __m512i made = _mm512_castsi128_si512((__m128i)each[0]);
  made = _mm512_mask_broadcast_i32x4(made, 0x00f0, (__m128i)each[1]);
  made = _mm512_mask_broadcast_i32x4(made, 0x0f00, (__m128i)each[2]);
  return (vec_int)_mm512_mask_broadcast_i32x4(made, 0xf000, (__m128i)each[3]);
#else
  return (vec_int)__builtin_shufflevector(each[0], each[1], 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18,
                                          19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31);
#endif
}

// Within each piece: the lanes of x and y in turns, of its first or of its second half.
inline vec_int first_in_turns(vec_int x, vec_int y) {
#if SIXTEEN_LANES
  return __builtin_shufflevector(x, y, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29);
#else
  return __builtin_shufflevector(x, y, 0, 8, 1, 9, 4, 12, 5, 13);
#endif
}
inline vec_int second_in_turns(vec_int x, vec_int y) {
#if SIXTEEN_LANES
  return __builtin_shufflevector(x, y, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
#else
  return __builtin_shufflevector(x, y, 2, 10, 3, 11, 6, 14, 7, 15);
#endif
}

// Four vectors of pieces turned: made[i] holds, for each piece's place, lane i of that piece of each of them.
inline void turn(const vec_int (&x)[4], vec_int (&made)[4]) {
  const vec_int low[2] = {first_in_turns(x[0], x[2]), first_in_turns(x[1], x[3])};
  const vec_int high[2] = {second_in_turns(x[0], x[2]), second_in_turns(x[1], x[3])};
  made[0] = first_in_turns(low[0], low[1]);
  made[1] = second_in_turns(low[0], low[1]);
  made[2] = first_in_turns(high[0], high[1]);
  made[3] = second_in_turns(high[0], high[1]);
}

#if SIXTEEN_LANES
// 32 bytes from each of two places.
inline vec_int two_halves(const uint8_t* first, const uint8_t* second) {
  const __m256i low = read<__m256i>(first), high = read<__m256i>(second);
  return (vec_int)_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}
#endif

// BYTES of the codes of LANES slots, `row` from one slot to the next: made[i] holds bytes 4 i to 4 i + 3 of each.
template <int BYTES>
inline void quads_by_slot(const uint8_t* from, int64_t row, vec_int (&made)[BYTES > 16 ? 8 : 4]) {
#if SIXTEEN_LANES
  if constexpr (BYTES == 32) {
    vec_int x[2][4], part[2][4];
    for (int eight = 0; eight < 2; ++eight) {
      for (int i = 0; i < 4; ++i) x[eight][i] = two_halves(from + (8 * eight + i) * row, from + (8 * eight + 4 + i) * row);
      turn(x[eight], part[eight]);
    }
    for (int i = 0; i < 4; ++i) {
      made[i] = (vec_int)_mm512_shuffle_i32x4((__m512i)part[0][i], (__m512i)part[1][i], 0x88);
      made[4 + i] = (vec_int)_mm512_shuffle_i32x4((__m512i)part[0][i], (__m512i)part[1][i], 0xdd);
    }
    return;
  }
#endif
  if constexpr (BYTES <= 16) {
    vec_int x[4];
    for (int i = 0; i < 4; ++i) x[i] = pieces<BYTES>(from + i * row, 4 * row);
    turn(x, made);
  }
}

// BYTES of the codes of four slots, `row` from one slot to the next: byte i of each is lane i of what is made.
template <int BYTES>
inline void quads_by_byte(const uint8_t* from, int64_t row, vec_int (&made)[(BYTES > 16 ? 32 : 16) / LANES]) {
#if SIXTEEN_LANES
  if constexpr (BYTES == 32) {
#if defined(__AVX512VBMI__)
    const __m512i x = (__m512i)two_halves(from, from + row), y = (__m512i)two_halves(from + 2 * row, from + 3 * row);
    for (int i = 0; i < 2; ++i) {
      // bytes 0, 32, 64, 96, 1, 33 and so on, from 16 i on
      const __m512i first = _mm512_set1_epi32(0x60402000 + 0x10101010 * i);
      const __m512i order = _mm512_add_epi32(
          first, _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                    _mm512_set1_epi32(0x01010101)));
      made[i] = (vec_int)_mm512_permutex2var_epi8(x, order, y);
    }
#else
    vec_int low[1], high[1];
    quads_by_byte<16>(from, row, low);
    quads_by_byte<16>(from + 16, row, high);
    made[0] = low[0], made[1] = high[0];
#endif
  } else {
    const __m512i lanes = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i bytes = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    made[0] = (vec_int)_mm512_shuffle_epi8(_mm512_permutexvar_epi32(lanes, (__m512i)pieces<BYTES>(from, row)), bytes);
  }
#elif defined(__AVX2__)
  const __m256i even = (__m256i)pieces<BYTES>(from, 2 * row), odd = (__m256i)pieces<BYTES>(from + row, 2 * row);
  const __m256i order = _mm256_setr_epi8(0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15, 0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12,
                                         13, 6, 7, 14, 15);
  const __m256i in_turns[2] = {_mm256_unpacklo_epi8(even, odd), _mm256_unpackhi_epi8(even, odd)};
  for (int i = 0; i < 2; ++i) made[i] = (vec_int)_mm256_shuffle_epi8(_mm256_permute4x64_epi64(in_turns[i], 0xd8), order);
#else
  uint8_t bytes[16][4] = {};
  for (int slot = 0; slot < 4; ++slot)
    for (int i = 0; i < BYTES; ++i) bytes[i][slot] = from[slot * row + i];
  std::memcpy(made, bytes, sizeof bytes);
#endif
}

// What a slot's codes take in memory, and which pieces they are read in: the last one ends where they end.
template <int BITS, int DIM>
struct Layout {
  static constexpr int ROW = DIM * BITS / 8, BYTES = LANES == 16 && ROW >= 32 ? 32 : ROW >= 16 ? 16 : ROW;
  static constexpr int PIECES = (ROW + BYTES - 1) / BYTES, QUADS = BYTES > 16 ? 8 : 4, LONG = (BYTES > 16 ? 32 : 16) / LANES;
  static constexpr int start(int i) { return BYTES * i + BYTES <= ROW ? BYTES * i : ROW - BYTES; }
};

// quads[i][s]: codes 4 i to 4 i + 3 of slot s, of `slots` slots; LANES at a time are read.
template <int BITS, int DIM>
void by_slot(const uint8_t* codes, int64_t slots, uint32_t (*quads)[BLOCK]) {
  using Of = Layout<BITS, DIM>;
  for (int64_t s = 0; s < slots; s += LANES)
#pragma GCC unroll 16
    for (int i = 0; i < Of::PIECES; ++i) {
      vec_int made[Of::QUADS];
      quads_by_slot<Of::BYTES>(codes + s * Of::ROW + Of::start(i), Of::ROW, made);
#pragma GCC unroll 8
      for (int n = 0; n < Of::BYTES / 4; ++n) {
        const int at = Of::start(i) / 4 + n;
        if constexpr (BITS == 8) {
          write_quads(made[n], quads[at] + s);
        } else {
          write_quads(made[n] & 0x0f0f0f0f, quads[at] + s);
          write_quads((made[n] >> 4) & 0x0f0f0f0f, quads[DIM / 8 + at] + s);
        }
      }
    }
}

// quads[i][d]: code d of slots 4 i to 4 i + 3, of `slots` slots; four at a time are read, and up to 15 lanes behind DIM are
// written.
template <int BITS, int DIM, int WIDTH>
void by_element(const uint8_t* codes, int64_t slots, uint32_t (*quads)[WIDTH]) {
  using Of = Layout<BITS, DIM>;
  static_assert(WIDTH >= (DIM + 15) / 16 * 16);
  for (int64_t n = 0; n < slots / 4; ++n) {
#pragma GCC unroll 16
    for (int i = 0; i < Of::PIECES; ++i) {
      vec_int made[Of::LONG];
      quads_by_byte<Of::BYTES>(codes + 4 * n * Of::ROW + Of::start(i), Of::ROW, made);
      uint32_t* to = quads[n] + Of::start(i);
      for (int high = 0; high < (BITS == 4 ? 2 : 1); ++high)  // what the first write behind their end the second write over
        for (int part = 0; part < Of::LONG; ++part) {
          const vec_int codes = BITS == 8 ? made[part] : (high ? made[part] >> 4 : made[part]) & 0x0f0f0f0f;
          write_quads(codes, to + high * DIM / 2 + part * LANES);
        }
    }
  }
}

}  // namespace
