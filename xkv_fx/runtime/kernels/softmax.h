// The running softmax of decode attention over the slots of a layer, some at a time.
//
// Before this text stands lanes.h.

namespace {

constexpr int64_t CHUNK = 256;  // slots of one task
constexpr int64_t TILE = 64;    // slots between two updates of the running softmax
constexpr float NOTHING = -std::numeric_limits<float>::infinity();
static_assert(TILE % LANES == 0 && CHUNK % TILE == 0);

struct Running {  // of one query head over a chunk of slots
  float maximum, sum;
};

// exp for x <= 0, to about 3e-7 of its value above 1e-4: a power of two times a polynomial on [-1/2, 1/2].
inline vec exp_of(vec x) {
#if SIXTEEN_LANES
  const vec bounded = (vec)_mm512_max_ps(_mm512_set1_ps(-200.0f), (__m512)x);  // in this order a NaN stays one
  const vec n = (vec)_mm512_roundscale_ps((__m512)(bounded * 1.44269504088896341f), 0), r = bounded * 1.44269504088896341f - n;
#else
  const vec bounded = x < -87.0f ? vec{} - 87.0f : x;
  const vec_int n = __builtin_convertvector(bounded * 1.44269504088896341f - 0.5f, vec_int);
  const vec r = bounded * 1.44269504088896341f - __builtin_convertvector(n, vec);
#endif
  vec p = r * 1.5403530e-4f + 1.3333558e-3f;
  p = p * r + 9.6181291e-3f;
  p = p * r + 5.5504109e-2f;
  p = p * r + 2.4022651e-1f;
  p = p * r + 6.9314718e-1f;
  p = p * r + 1.0f;
#if SIXTEEN_LANES
  return (vec)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  const vec_int bits = read<vec_int>(&p) + (n << 23);
  return x < -87.0f ? vec{} : read<vec>(&bits);
#endif
}

// The mask of `count` slots; what is behind them, up to `filled`, is not shown.
void show(const scalar* mask, int64_t count, int64_t filled, float* shown) {
  int64_t s = 0;
  for (; s + LANES <= count; s += LANES) {
    const vec several = widen_lanes(mask + s);
    std::memcpy(shown + s, &several, sizeof several);
  }
  for (; s < count; ++s) shown[s] = widen(mask[s]);
  for (; s < filled; ++s) shown[s] = NOTHING;
}

// Turns logits into weights relative to the running maximum. Entries from `count` on, up to `filled`, a multiple of LANES,
// get weight 0. Returns what values that were summed under an older maximum are to be multiplied by.
float softmax(float* logits, const float* shown, int64_t count, int64_t filled, float softcap, Running& head) {
  if (softcap > 0.0f)
    for (int64_t s = 0; s < count; ++s) logits[s] = softcap * std::tanh(logits[s] / softcap);
  for (int64_t s = count; s < filled; ++s) logits[s] = 0.0f;
  vec most = vec{} + head.maximum;
  for (int64_t s = 0; s < filled; s += LANES) {
    const vec x = read<vec>(logits + s) + read<vec>(shown + s);
    std::memcpy(logits + s, &x, sizeof x);
    most = larger(x, most);
  }
  const float maximum = max_of(most);
  if (maximum == NOTHING) {  // nothing is shown, or what is shown are no numbers, which the sum tells
    vec sum = {};
    for (int64_t s = 0; s < filled; s += LANES) sum += read<vec>(logits + s);
    head.sum += sum_of(sum) == NOTHING ? 0.0f : sum_of(sum);
    std::fill(logits, logits + filled, 0.0f);
    return 1.0f;
  }
  vec sum = {};
  for (int64_t s = 0; s < filled; s += LANES) {
    const vec weight = exp_of(read<vec>(logits + s) - maximum);
    std::memcpy(logits + s, &weight, sizeof weight);
    sum += weight;
  }
  float shrink = 1.0f;
  if (maximum != head.maximum) {
    shrink = head.maximum == NOTHING ? 0.0f : exp_of(vec{} + (head.maximum - maximum))[0];
    head.maximum = maximum;
    head.sum *= shrink;
  }
  head.sum += sum_of(sum);
  return shrink;
}

}  // namespace
