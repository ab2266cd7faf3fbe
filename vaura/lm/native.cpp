// Steps of the token LM on a CPU, in which every weight is read once for all rows.
//
// Few rows are a walk through memory: a product of 2 rows does 4 operations for each weight read, and a core does hundreds in
// that time. So the weights lie in the order in which they are read, in stripes of 32 outputs, one run of stripes a thread:
//
//   stripe = [inputs / group][32 outputs][group]    group: what one instruction multiplies and adds: 1 of float32, 2 of bfloat16, 4 of int8
//
// Few rows take vector products, more take tiles (AMX) where the processor has them, else a few at a time from the inner cache.
// A row is a position of a sequence: rows of different sequences are a batch, rows of one sequence a prompt.
// The stream x stays in float32. What is multiplied with bfloat16 weights is bfloat16, as are keys and values unless all is float32.
// What is multiplied with int8 weights is a 16-bit integer, in two unsigned bytes: u = round(x / scale) + 32768 = 256 high + low,
// hence  sum w x = scale (256 (sum w high - 128 sum w) + sum w low):  the weights are never unpacked, and x loses nothing.
//
// Vectors are those of GCC and Clang, for any processor; AVX512-BF16, AVX512-VNNI and AMX are used where the compiler's target has them.
// Called from native.py, which holds the same structs and packs the weights.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AMX_BF16__)
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

typedef float v16 __attribute__((vector_size(64)));
typedef int32_t i16 __attribute__((vector_size(64)));
typedef uint32_t u16 __attribute__((vector_size(64)));
typedef uint16_t half16 __attribute__((vector_size(32)));
typedef int8_t byte16 __attribute__((vector_size(16)));

enum Format : int64_t { FLOAT32 = 0, BFLOAT16 = 1, INT8 = 2 };

extern "C" {
struct Matrix {           // a weight (outputs, inputs), padded to multiples of 32 and 64 and packed into stripes
  const void* weight;
  const float* scale;     // of each output, int8 only
  const int32_t* sum;     // of each output's weights, int8 only
  int64_t outputs, inputs;
};
struct Layer {
  Matrix qkv, out, gate_up, down;  // a stripe of gate_up is 16 outputs of the gate and the same 16 of up
  const float *attention_norm, *ffn_norm;
};
struct Model {
  int64_t format, layers, dim, heads, hidden, logits;
  const Layer* layer;
  Matrix head;
  const float* norm;
  double eps;
};
struct Cache {            // keys and values (layers, sequences, heads, slots, head_dim padded to 16): float, or bfloat16 in half
  void *keys, *values;
  int64_t sequences, slots;
};
struct Rows {
  int64_t count;
  const float* x;         // (count, dim)
  const float* rotation;  // (count, head_dim / 2, 2): cosines and sines
  const int32_t* sequence;
  const int32_t* slot;    // where its key and value go
  const int32_t* seen;    // how many slots it looks at, from the first
  int64_t shared;         // whether several rows are of one sequence
  const int32_t* wanted;  // the rows whose logits are wanted
  int64_t num_wanted;
};
}

namespace {

#if defined(__AVX512BF16__)
constexpr bool HALVES = true;   // products of bfloat16 pairs
#else
constexpr bool HALVES = false;  // float32 in their place
#endif
#if defined(__AVX512VNNI__)
constexpr bool BYTES = true;    // products of four bytes
#else
constexpr bool BYTES = false;
#endif

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

inline v16 load(const float* p) { v16 v; std::memcpy(&v, p, 64); return v; }
inline void store(float* p, v16 v) { std::memcpy(p, &v, 64); }

inline v16 load(const uint16_t* p) {
  half16 h;
  std::memcpy(&h, p, 32);
  return (v16)(__builtin_convertvector(h, u16) << 16);
}

inline uint16_t to_half(float f) {  // to the nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  if (std::isnan(f)) return 0x7fc0;
  return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline void store(uint16_t* p, v16 v) {
#if defined(__AVX512BF16__) && defined(__AVX512VL__)
  __m256bh h = _mm512_cvtneps_pbh((__m512)v);
  std::memcpy(p, &h, 32);
#else
  for (int i = 0; i < 16; i++) p[i] = to_half(v[i]);
#endif
}

inline float sum(v16 v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#else
  float s = 0;
  for (int i = 0; i < 16; i++) s += v[i];
  return s;
#endif
}

inline v16 exp16(v16 x) {  // e^x = 2^n e^r with |r| <= ln 2 / 2, and the series of e^r to the seventh power: 2 units in the last place
  x = x > 88.0f ? v16{} + 88.0f : x;
  x = x < -87.0f ? v16{} - 87.0f : x;
  v16 n = x * 1.44269504f;
  i16 whole = __builtin_convertvector(n + (n < 0.0f ? v16{} - 0.5f : v16{} + 0.5f), i16);
  n = __builtin_convertvector(whole, v16);
  v16 r = x - n * 0.693359375f + n * 2.12194440e-4f;
  v16 s = v16{} + 1.0f / 5040;
  s = s * r + 1.0f / 720;
  s = s * r + 1.0f / 120;
  s = s * r + 1.0f / 24;
  s = s * r + 1.0f / 6;
  s = s * r + 0.5f;
  s = s * r + 1.0f;
  s = s * r + 1.0f;
  return s * (v16)((whole + 127) << 23);
}

// --- rows as products read them ---

template <Format F> struct Of {
  static constexpr int64_t weight = 2, group = 2;
  typedef typename std::conditional<HALVES, uint16_t, float>::type Value;
};
template <> struct Of<FLOAT32> { static constexpr int64_t weight = 4, group = 1; typedef float Value; };
template <> struct Of<INT8> {
  static constexpr int64_t weight = 1, group = 4;
  typedef typename std::conditional<BYTES, uint16_t, float>::type Value;  // two bytes, apart: all high ones, then all low ones
};

struct Input {            // rows of values
  uint8_t* at;
  int64_t stride;         // bytes
  float* scale;           // of each row, int8 only

  template <class T> const T* row(int64_t r) const { return (const T*)(at + r * stride); }
};

template <Format F>
inline void put(const float* x, int64_t inputs, const Input& to, int64_t row) {  // x (inputs), of which those beyond the true ones are 0
  uint8_t* at = to.at + row * to.stride;
  if constexpr (F == INT8 && BYTES) {
    v16 most = {};
    for (int64_t i = 0; i < inputs; i += 16) {
      v16 v = load(x + i);
      v = v < 0.0f ? -v : v;
      most = v > most ? v : most;
    }
    float top = 1e-20f;
    for (int i = 0; i < 16; i++) top = std::max(top, most[i]);
    to.scale[row] = top / 32767;
    const float by = 32767 / top;
    for (int64_t i = 0; i < inputs; i += 16) {
      const v16 v = load(x + i) * by;
      const i16 whole = __builtin_convertvector(v + (v < 0.0f ? v16{} - 0.5f : v16{} + 0.5f), i16) + 32768;
      const byte16 high = __builtin_convertvector(whole >> 8, byte16), low = __builtin_convertvector(whole & 255, byte16);
      std::memcpy(at + i, &high, 16);
      std::memcpy(at + inputs + i, &low, 16);
    }
  } else {
    for (int64_t i = 0; i < inputs; i += 16) store((typename Of<F>::Value*)at + i, load(x + i));
  }
}

// --- products of a stripe with few rows ---

inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }

constexpr int64_t AHEAD = 4096;  // bytes of a thread's stream asked for beforehand

inline void ask(const uint8_t* w, int64_t bytes) {
  for (int64_t b = 0; b < bytes; b += 64) prefetch(w + AHEAD + b);
}

template <class T>
inline int32_t group_of(const T* x) {
  int32_t group;
  std::memcpy(&group, x, 4);
  return group;
}

#if !defined(__AVX512BF16__)
inline void spread(const uint16_t* w, v16& even, v16& odd) {
  u16 both;
  std::memcpy(&both, w, 64);
  even = (v16)(both << 16);
  odd = (v16)(both & 0xffff0000u);
}
#endif

// y (R, 32) = rows [first, first + some) of x, the last of them again up to R, times a stripe, but for the scales of the outputs
template <Format F, int R>
void dots(const uint8_t* w, const int32_t* sums, const Input& x, int64_t first, int64_t some, int64_t inputs, v16 (*y)[2]) {
  typedef typename Of<F>::Value Value;
  const Value* row[R];
  float scale[R];
  for (int r = 0; r < R; r++) {
    const int64_t number = first + std::min<int64_t>(r, some - 1);
    row[r] = x.row<Value>(number);
    scale[r] = F == INT8 && BYTES ? x.scale[number] : 1.0f;
  }
  constexpr int64_t turn = 32 * Of<F>::group * Of<F>::weight;  // bytes of the 32 outputs of a group
#if defined(__AVX512VNNI__)
  if constexpr (F == INT8) {
    __m512i high[R][2], low[R][2];
    for (int h = 0; h < 2; h++) {
      const __m512i start = _mm512_slli_epi32(_mm512_loadu_si512(sums + 16 * h), 7);
      for (int r = 0; r < R; r++) high[r][h] = _mm512_sub_epi32(_mm512_setzero_si512(), start), low[r][h] = _mm512_setzero_si512();
    }
    for (int64_t k = 0; k < inputs; k += 4, w += turn) {
      ask(w, turn);
      const __m512i w0 = _mm512_loadu_si512(w), w1 = _mm512_loadu_si512(w + 64);
      for (int r = 0; r < R; r++) {
        const uint8_t* at = (const uint8_t*)row[r] + k;
        const __m512i upper = _mm512_set1_epi32(group_of(at)), lower = _mm512_set1_epi32(group_of(at + inputs));
        high[r][0] = _mm512_dpbusd_epi32(high[r][0], upper, w0);
        high[r][1] = _mm512_dpbusd_epi32(high[r][1], upper, w1);
        low[r][0] = _mm512_dpbusd_epi32(low[r][0], lower, w0);
        low[r][1] = _mm512_dpbusd_epi32(low[r][1], lower, w1);
      }
    }
    for (int r = 0; r < R; r++)
      for (int h = 0; h < 2; h++)
        y[r][h] = ((v16)_mm512_cvtepi32_ps(high[r][h]) * 256.0f + (v16)_mm512_cvtepi32_ps(low[r][h])) * scale[r];
    return;
  }
#endif
#if defined(__AVX512BF16__)
  if constexpr (F == BFLOAT16) {
    constexpr int CHAINS = R <= 4 ? 2 : 1;  // a product waits some cycles for the one before
    __m512 a[CHAINS][R][2];
    for (auto& chain : a) for (auto& sum : chain) sum[0] = sum[1] = _mm512_setzero_ps();
    for (int64_t k = 0; k < inputs; k += 4, w += 2 * turn) {
      ask(w, 2 * turn);
      for (int c = 0; c < 2; c++) {
        const __m512bh w0 = (__m512bh)_mm512_loadu_si512(w + c * turn), w1 = (__m512bh)_mm512_loadu_si512(w + c * turn + 64);
        for (int r = 0; r < R; r++) {
          const __m512bh v = (__m512bh)_mm512_set1_epi32(group_of(row[r] + k + 2 * c));
          auto& sum = a[c % CHAINS][r];
          sum[0] = _mm512_dpbf16_ps(sum[0], w0, v);
          sum[1] = _mm512_dpbf16_ps(sum[1], w1, v);
        }
      }
    }
    for (int r = 0; r < R; r++)
      for (int h = 0; h < 2; h++) y[r][h] = (v16)(CHAINS == 2 ? _mm512_add_ps(a[0][r][h], a[CHAINS - 1][r][h]) : a[0][r][h]);
    return;
  }
#endif
  v16 a[R][2] = {};
  for (int64_t k = 0; k < inputs; k += Of<F>::group, w += turn) {
    ask(w, turn);
    for (int h = 0; h < 2; h++) {
      if constexpr (F == FLOAT32) {
        const v16 weight = load((const float*)w + 16 * h);
        for (int r = 0; r < R; r++) a[r][h] += weight * row[r][k];
      }
#if !defined(__AVX512BF16__)
      if constexpr (F == BFLOAT16) {
        v16 even, odd;
        spread((const uint16_t*)w + 32 * h, even, odd);
        for (int r = 0; r < R; r++) a[r][h] += even * row[r][k] + odd * row[r][k + 1];
      }
#endif
#if !defined(__AVX512VNNI__)
      if constexpr (F == INT8) {
        i16 four;
        std::memcpy(&four, w + 64 * h, 64);
        for (int g = 0; g < 4; g++) {
          const v16 weight = __builtin_convertvector((four << (24 - 8 * g)) >> 24, v16);
          for (int r = 0; r < R; r++) a[r][h] += weight * row[r][k + g];
        }
      }
#endif
    }
  }
  for (int r = 0; r < R; r++) y[r][0] = a[r][0], y[r][1] = a[r][1];
}

// --- products of a stripe with more rows, 16 at a time ---

#if defined(__AMX_BF16__) && defined(__AMX_INT8__) && defined(__AVX512BF16__) && defined(__AVX512VNNI__)
constexpr bool TILES = true;

struct TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

// Tiles 0 to 3 are sums, 4 and 5 rows of x, 6 and 7 of the stripe.
void begin_tiles() {
  TileConfig config;
  for (int t = 0; t < 8; t++) config.bytes[t] = 64, config.rows[t] = 16;
  _tile_loadconfig(&config);
}

void end_tiles() { _tile_release(); }

bool may_use_tiles() {
  static const bool allowed = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0;
  return allowed;
}

// y (32, 32) = rows [first, first + 32) of x, or half of them, times a stripe
template <Format F>
inline void tiles(const uint8_t* w, const int32_t* sums, const Input& x, int64_t first, bool both, int64_t inputs, bool fresh, v16 (*y)[2]) {
  alignas(64) float out[4][16][16];
  const uint8_t* at = x.row<uint8_t>(first);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t k = 0; k < inputs * (F == INT8 ? 1 : 2); k += 64, w += 2048) {  // k counts bytes
    if (fresh) ask(w, 2048);
    _tile_loadd(6, w, 128);
    _tile_loadd(7, w + 64, 128);
    _tile_loadd(4, at + k, x.stride);
    if constexpr (F == INT8) {
      _tile_loadd(5, at + inputs + k, x.stride);
      _tile_dpbusd(0, 4, 6);
      _tile_dpbusd(1, 4, 7);
      _tile_dpbusd(2, 5, 6);
      _tile_dpbusd(3, 5, 7);
    } else {
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      if (both) {
        _tile_loadd(5, at + 16 * x.stride + k, x.stride);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
  }
  _tile_stored(0, out[0], 64);
  _tile_stored(1, out[1], 64);
  _tile_stored(2, out[2], 64);
  _tile_stored(3, out[3], 64);
  for (int r = 0; r < 16; r++)
    for (int h = 0; h < 2; h++) {
      if constexpr (F == INT8) {
        const __m512i high = _mm512_sub_epi32(_mm512_loadu_si512(out[h][r]), _mm512_slli_epi32(_mm512_loadu_si512(sums + 16 * h), 7));
        const v16 low = (v16)_mm512_cvtepi32_ps(_mm512_loadu_si512(out[2 + h][r]));
        y[r][h] = ((v16)_mm512_cvtepi32_ps(high) * 256.0f + low) * x.scale[first + r];
      } else {
        y[r][h] = load(out[h][r]);
        y[16 + r][h] = load(out[2 + h][r]);
      }
    }
}
#else
constexpr bool TILES = false;
void begin_tiles() {}
void end_tiles() {}
bool may_use_tiles() { return false; }
#endif

// --- one matrix, by the run of stripes that is a thread's ---

struct Thread {
  int number, of;
  bool tiles;
};

#if defined(__AVX512F__)
template <Format F> constexpr int FEW = F == INT8 ? 4 : 8;  // rows whose sums find room in the registers
#else
template <Format F> constexpr int FEW = 4;
#endif

constexpr int TILED = 4;  // rows above which tiles are quicker, where there are any

template <Format F, class Done>
void product(const Matrix& m, const Input& x, int64_t rows, const Thread& me, Done done) {
  const int64_t stripes = m.outputs / 32, bytes = 32 * m.inputs * Of<F>::weight;
  for (int64_t s = stripes * me.number / me.of; s < stripes * (me.number + 1) / me.of; s++) {
    const uint8_t* stripe = (const uint8_t*)m.weight + s * bytes;
    const int32_t* sums = F == INT8 ? m.sum + 32 * s : nullptr;
    v16 y[32][2];
    auto give = [&](int64_t first, int64_t some) {
      for (int64_t r = 0; r < some; r++) {
        if constexpr (F == INT8) y[r][0] *= load(m.scale + 32 * s), y[r][1] *= load(m.scale + 32 * s + 16);
        done(s, first + r, y[r][0], y[r][1]);
      }
    };
#if defined(__AMX_BF16__) && defined(__AMX_INT8__) && defined(__AVX512BF16__) && defined(__AVX512VNNI__)
    if constexpr (F != FLOAT32) {
      if (me.tiles && rows > TILED) {  // tiles read 16 rows whatever is asked for: fewer lie in memory that has no room for these
        constexpr int64_t most = F == INT8 ? 16 : 32;
        for (int64_t first = 0; first < rows; first += most) {
          tiles<F>(stripe, sums, x, first, rows - first > 16, m.inputs, first == 0, y);
          give(first, std::min(most, rows - first));
        }
        continue;
      }
    }
#endif
    for (int64_t first = 0; first < rows; first += FEW<F>) {
      const int64_t some = std::min<int64_t>(FEW<F>, rows - first);
      if (some == 1) dots<F, 1>(stripe, sums, x, first, some, m.inputs, y);
      else if (some == 2) dots<F, 2>(stripe, sums, x, first, some, m.inputs, y);
      else if (some <= 4) dots<F, 4>(stripe, sums, x, first, some, m.inputs, y);
      else dots<F, FEW<F>>(stripe, sums, x, first, some, m.inputs, y);
      give(first, some);
    }
  }
}

// --- what lies between the products ---

void normalise(const float* x, const float* weight, int64_t dim, double eps, float* y) {  // y beyond dim stays as it is: zero
  v16 squares = {};
  int64_t i = 0;
  for (; i + 16 <= dim; i += 16) squares += load(x + i) * load(x + i);
  float all = sum(squares);
  for (int64_t j = i; j < dim; j++) all += x[j] * x[j];
  const float by = 1.0f / std::sqrt(all / dim + (float)eps);
  for (i = 0; i + 16 <= dim; i += 16) store(y + i, load(x + i) * by * load(weight + i));
  for (; i < dim; i++) y[i] = x[i] * by * weight[i];
}

// adjacent channel pairs of `from` turned into `to`, which has room for whole vectors
inline void turn(const float* from, const float* rotation, int64_t head_dim, float* to) {
  for (int64_t i = 0; i < head_dim; i += 2) {
    const float c = rotation[i], s = rotation[i + 1];
    to[i] = from[i] * c - from[i + 1] * s;
    to[i + 1] = from[i] * s + from[i + 1] * c;
  }
}

constexpr int64_t WIDEST = 512;  // channels of a head

template <class C>
void remember(const float* qkv, const Rows& rows, int64_t row, int64_t head, int64_t dim, int64_t head_dim, C* key, C* value) {
  alignas(64) float k[WIDEST] = {}, v[WIDEST] = {};
  turn(qkv + dim + head * head_dim, rows.rotation + row * head_dim, head_dim, k);
  std::memcpy(v, qkv + 2 * dim + head * head_dim, head_dim * sizeof(float));
  for (int64_t i = 0; i < head_dim; i += 16) store(key + i, load(k + i)), store(value + i, load(v + i));
}

template <class C>
void attend(const float* query, const float* rotation, const C* keys, const C* values, int64_t seen, int64_t head_dim, float* scores, float* y) {
  const int64_t wide = round_up(head_dim, 16), parts = wide / 16;
  alignas(64) float q[WIDEST] = {};
  turn(query, rotation, head_dim, q);
  const float scale = 1.0f / std::sqrt((float)head_dim);
  float most = -INFINITY;
  for (int64_t j = 0; j < seen; j++) {
    v16 s = load(q) * load(keys + j * wide);
    for (int64_t p = 1; p < parts; p++) s += load(q + 16 * p) * load(keys + j * wide + 16 * p);
    scores[j] = sum(s) * scale;
    most = std::max(most, scores[j]);
  }
  for (int64_t j = seen; j < round_up(seen, 16); j++) scores[j] = -INFINITY;
  v16 total = {};
  for (int64_t j = 0; j < seen; j += 16) {
    const v16 score = load(scores + j), share = score < -1e30f ? v16{} : exp16(score - most);
    store(scores + j, share);
    total += share;
  }
  const float by = 1.0f / sum(total);
  v16 mixed[WIDEST / 16] = {};
  for (int64_t j = 0; j < seen; j++)
    for (int64_t p = 0; p < parts; p++) mixed[p] += load(values + j * wide + 16 * p) * scores[j];
  alignas(64) float out[WIDEST];
  for (int64_t p = 0; p < parts; p++) store(out + 16 * p, mixed[p] * by);
  std::memcpy(y, out, head_dim * sizeof(float));
}

constexpr int64_t ALONE = 4;  // rows up to which every thread prepares all for itself, which is quicker than waiting for another

// Where everything of a step lies in the caller's memory, in bytes.
struct Room {
  int64_t inner, ffn, three, widest, stream, mixed, hidden, qkv, ready, scale, scores, own, each, all = 0;
  Room(const Model& m, int64_t rows, int64_t slots, int64_t threads)
      : inner(round_up(m.dim, 64)), ffn(round_up(m.hidden, 64)), three(round_up(3 * m.dim, 32)), widest(std::max(inner, ffn)) {
    auto take = [&](int64_t bytes) {
      const int64_t here = all;
      all += round_up(bytes, 64);
      return here;
    };
    const int64_t padded = round_up(rows, 32);
    stream = take(rows * inner * 4);
    mixed = take(rows * inner * 4);
    hidden = take(rows * ffn * 4);
    qkv = take(rows * three * 4);
    ready = take(padded * widest * 4);
    scale = take(padded * 4);
    scores = take(threads * round_up(slots, 16) * 4);
    each = round_up(widest * 4 * (ALONE + 1) + ALONE * 4, 64);  // a float row, then rows as products read them, then their scales
    own = take(threads * each);
  }
};

template <Format F>
void step(const Model& m, const Cache& cache, const Rows& rows, float* logits, uint8_t* memory, int threads) {
  typedef typename std::conditional<F == FLOAT32, float, uint16_t>::type C;
  const Room room(m, rows.count, cache.slots, threads);
  const int64_t n = rows.count, dim = m.dim, inner = room.inner, ffn = room.ffn, three = room.three, head_dim = dim / m.heads;
  float *stream = (float*)(memory + room.stream), *mixed = (float*)(memory + room.mixed), *hidden = (float*)(memory + room.hidden);
  float* qkv = (float*)(memory + room.qkv);
  const int64_t wide = round_up(head_dim, 16), per_sequence = m.heads * cache.slots * wide, per_layer = cache.sequences * per_sequence;
  const bool may_tile = TILES && F != FLOAT32 && n > TILED && may_use_tiles();
  std::memset(stream, 0, n * inner * 4);
  std::memset(mixed, 0, n * inner * 4);
  std::memset(hidden, 0, n * ffn * 4);

#pragma omp parallel num_threads(threads)
  {
    Thread me{omp_get_thread_num(), omp_get_num_threads(), may_tile};
    if (may_tile) begin_tiles();
    float* scores = (float*)(memory + room.scores) + me.number * round_up(cache.slots, 16);
    uint8_t* own = memory + room.own + me.number * room.each;
    float* line = (float*)own;
    std::memset(line, 0, room.widest * 4);
    const Input mine{own + room.widest * 4, room.widest * 4, (float*)(own + room.widest * 4 * (ALONE + 1))};
    const Input ours{memory + room.ready, room.widest * 4, (float*)(memory + room.scale)};

    // Rows of floats, normed where there is a weight, as the next product reads them. All threads wait for each other unless few.
    auto ready = [&](int64_t count, auto row, int64_t inputs, const float* weight) -> Input {
      const bool alone = count <= ALONE;
      const Input& to = alone ? mine : ours;
      for (int64_t r = alone ? 0 : me.number; r < count; r += alone ? 1 : me.of) {
        const float* x = row(r);
        if (weight) normalise(x, weight, dim, m.eps, line), x = line;
        put<F>(x, inputs, to, r);
        if (weight) std::memset(line + dim, 0, (inner - dim) * 4);
      }
      if (!alone) {
#pragma omp barrier
      }
      return to;
    };
    auto streams = [&](int64_t r) { return stream + r * inner; };
    auto add = [&](int64_t s, int64_t r, v16 a, v16 b) {
      float* to = stream + r * inner + 32 * s;
      store(to, load(to) + a), store(to + 16, load(to + 16) + b);
    };

    for (int64_t r = me.number; r < n; r += me.of) std::memcpy(stream + r * inner, rows.x + r * dim, dim * sizeof(float));
#pragma omp barrier
    for (int64_t l = 0; l < m.layers; l++) {
      const Layer& layer = m.layer[l];
      C *keys = (C*)cache.keys + l * per_layer, *values = (C*)cache.values + l * per_layer;
      product<F>(layer.qkv, ready(n, streams, inner, layer.attention_norm), n, me, [&](int64_t s, int64_t r, v16 a, v16 b) {
        float* to = qkv + r * three + 32 * s;
        store(to, a), store(to + 16, b);
      });
#pragma omp barrier
      const int64_t items = n * m.heads, begin = items * me.number / me.of, end = items * (me.number + 1) / me.of;
      for (int64_t i = begin; i < end; i++) {
        const int64_t r = i / m.heads, h = i % m.heads;
        const int64_t at = rows.sequence[r] * per_sequence + (h * cache.slots + rows.slot[r]) * wide;
        remember(qkv + r * three, rows, r, h, dim, head_dim, keys + at, values + at);
      }
      if (rows.shared) {
#pragma omp barrier
      }
      for (int64_t i = begin; i < end; i++) {
        const int64_t r = i / m.heads, h = i % m.heads, at = rows.sequence[r] * per_sequence + h * cache.slots * wide;
        const float* query = qkv + r * three + h * head_dim;
        float* to = mixed + r * inner + h * head_dim;
        attend(query, rows.rotation + r * head_dim, keys + at, values + at, rows.seen[r], head_dim, scores, to);
      }
#pragma omp barrier
      product<F>(layer.out, ready(n, [&](int64_t r) { return mixed + r * inner; }, inner, nullptr), n, me, add);
#pragma omp barrier
      product<F>(layer.gate_up, ready(n, streams, inner, layer.ffn_norm), n, me, [&](int64_t s, int64_t r, v16 gate, v16 up) {
        store(hidden + r * ffn + 16 * s, gate / (1.0f + exp16(-gate)) * up);
      });
#pragma omp barrier
      product<F>(layer.down, ready(n, [&](int64_t r) { return hidden + r * ffn; }, ffn, nullptr), n, me, add);
#pragma omp barrier
    }
    const Input last = ready(rows.num_wanted, [&](int64_t i) { return stream + rows.wanted[i] * inner; }, inner, m.norm);
    product<F>(m.head, last, rows.num_wanted, me, [&](int64_t s, int64_t r, v16 a, v16 b) {
      alignas(64) float y[32];
      store(y, a), store(y + 16, b);
      const int64_t some = std::min<int64_t>(32, m.logits - 32 * s);
      if (some > 0) std::memcpy(logits + r * m.logits + 32 * s, y, some * sizeof(float));
    });
    if (may_tile) end_tiles();
  }
}

}  // namespace

extern "C" {

// Bytes of memory that a step of so many rows needs, 64-aligned.
int64_t vaura_room(const Model* model, int64_t rows, int64_t slots, int64_t threads) {
  return Room(*model, rows, slots, threads).all;
}

// logits (num_wanted, model.logits) of one step.
void vaura_step(const Model* model, const Cache* cache, const Rows* rows, float* logits, void* memory, int64_t threads) {
  switch (model->format) {
    case FLOAT32: step<FLOAT32>(*model, *cache, *rows, logits, (uint8_t*)memory, (int)threads); break;
    case BFLOAT16: step<BFLOAT16>(*model, *cache, *rows, logits, (uint8_t*)memory, (int)threads); break;
    default: step<INT8>(*model, *cache, *rows, logits, (uint8_t*)memory, (int)threads);
  }
}

// Asks for huge pages, before the memory is touched: a walk through gigabytes then misses no page table.
void vaura_huge_pages(void* memory, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const uintptr_t page = 1 << 12, first = ((uintptr_t)memory + page - 1) / page * page;
  const uintptr_t last = ((uintptr_t)memory + bytes) / page * page;
  if (last > first) madvise((void*)first, last - first, MADV_HUGEPAGE);
#endif
}

// Reads `bytes` at `memory` and does nothing with them: the limit of every step. Returns what it read, so that it must.
float vaura_read(const void* memory, int64_t bytes, int64_t threads) {
  float all = 0;
#pragma omp parallel num_threads((int)threads) reduction(+ : all)
  {
    const int64_t lines = bytes / 256, t = omp_get_thread_num(), of = omp_get_num_threads();
    const float* end = (const float*)memory + lines * (t + 1) / of * 64;
    v16 a = {}, b = {}, c = {}, d = {};
    for (const float* p = (const float*)memory + lines * t / of * 64; p < end; p += 64) {
      for (int64_t i = 0; i < 256; i += 64) prefetch((const uint8_t*)p + AHEAD + i);
      a += load(p), b += load(p + 16), c += load(p + 32), d += load(p + 48);
    }
    all += sum(a + b + c + d);
  }
  return all;
}

}
