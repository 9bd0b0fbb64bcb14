// The running softmax of decode attention over the slots of a layer, tile after tile.
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

// exp for x <= 0, to about 1e-7 of its value: a power of two times a polynomial on [-ln 2 / 2, ln 2 / 2].
inline vec exp_of(vec x) {
  const vec bounded = x < -87.0f ? vec{} - 87.0f : x;
  const vec_int n = __builtin_convertvector(bounded * 1.44269504088896341f - 0.5f, vec_int);
  const vec rounded = __builtin_convertvector(n, vec);
  const vec r = (bounded - rounded * 0.693359375f) + rounded * 2.12194440e-4f;
  vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const vec_int bits = (n + 127) << 23;
  return x < -87.0f ? vec{} : p * read<vec>(&bits);
}

// The mask of a tile; what is behind `count` is not shown.
void show(const scalar* mask, int64_t count, float* shown) {
  int64_t s = 0;
  for (; s + LANES <= count; s += LANES) {
    const vec several = widen_lanes(mask + s);
    std::memcpy(shown + s, &several, sizeof several);
  }
  for (; s < count; ++s) shown[s] = widen(mask[s]);
  for (; s < TILE; ++s) shown[s] = NOTHING;
}

// Turns logits into weights relative to the running maximum. Entries from `count` on get weight 0. Returns what values that
// were summed under an older maximum are to be multiplied by.
float softmax(float* logits, const float* shown, int64_t count, float softcap, Running& head) {
  if (softcap > 0.0f)
    for (int64_t s = 0; s < count; ++s) logits[s] = softcap * std::tanh(logits[s] / softcap);
  for (int64_t s = count; s < TILE; ++s) logits[s] = 0.0f;
  vec most = vec{} + head.maximum;
  for (int64_t s = 0; s < TILE; s += LANES) {
    const vec x = read<vec>(logits + s) + read<vec>(shown + s);
    std::memcpy(logits + s, &x, sizeof x);
    most = larger(x, most);
  }
  const float maximum = max_of(most);
  if (maximum == NOTHING) {
    std::fill(logits, logits + TILE, 0.0f);
    return 1.0f;
  }
  vec sum = {};
  for (int64_t s = 0; s < TILE; s += LANES) {
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
