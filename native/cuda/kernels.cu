// The kernels of the operators in domain `dijiang.cuda`: a layer's recurrence, and a residual sum with its norm.
//
// Compiled twice: by NVRTC for the GPU at hand, and by the C++ compiler as their twin on the CPU, where one
// thread does the work of a block (DIJIANG_CUDA_THREADS: as many as on a GPU, threads.h). So they are written as
// loops over a block's work with barriers between them (SYNC). EACH: any number of items. ITEMS: one a thread,
// with numbers of its own that outlive the loop (OWN).
// No header is included.
// Equations: docs/adr/0010-native-operator.md.

#if defined(__CUDACC_RTC__) || defined(DIJIANG_CUDA_THREADS)
#define IN_THREADS
#define DEVICE static __device__ __forceinline__
#define KERNEL extern "C" __global__ void
#define THREADS static_cast<int>(blockDim.x)
#define BLOCK(axis) static_cast<int>(blockIdx.axis)
#define EACH(i, n) for (int i = threadIdx.x; i < (n); i += blockDim.x)
#define EACH_WARP(i, n) for (int i = threadIdx.x / 32; i < (n); i += blockDim.x / 32)
#define EACH_LANE(i, n) for (int i = threadIdx.x % 32; i < (n); i += 32)
#define ITEMS(o, n) if (const int o = threadIdx.x; o < (n))
#define OWN(name, count) float name[1][count]
#define MINE(name, o) name[0]
#define SYNC() __syncthreads()
#define UNROLL _Pragma("unroll")
#ifdef __CUDACC_RTC__
extern __shared__ float room[];
#endif
#else
#define DEVICE static inline
#define KERNEL static void
#define THREADS threads
#define BLOCK(axis) block.axis
#define EACH(i, n) for (int i = 0; i < (n); i++)
#define EACH_WARP(i, n) EACH(i, n)
#define EACH_LANE(i, n) EACH(i, n)
#define ITEMS(o, n) EACH(o, n)
#define OWN(name, count) \
  static thread_local const std::unique_ptr<float[][count]> name(new float[kMostThreads][count])
#define MINE(name, o) name[o]
#define SYNC() static_cast<void>(0)
#define UNROLL
static thread_local struct { int x, y, z; } block;
static thread_local int threads;
static thread_local float* room;
#endif

typedef long long Long;

// Heads whose features a block makes together; rows of a state that a thread keeps; channels that it norms.
constexpr int kTogether = 4, kRows = 16, kChannels = 16, kMostThreads = 1024;

// T: tokens, B: sequences, H: query heads, G: key/value heads, K: head size, d = H K, F: channels of an MLP.
struct Step {
  int batch, tokens, heads, groups, size, rotary, mlp, activation;
  int columns;               // of a state, that a block has
  int tile;                  // tokens that a block takes together
  float epsilon;
  const void* packed;        // [B, T, (H + G) K | G K | d | F]: q and k, v, gate, MLP-up
  const float* packed_bias;  // [(2 H + 2 G) K + F], null: none
  const float* cos;          // [B, T, rotary / 2], null: no rotary embedding
  const float* sin;
  const float* projection;   // [K, K]
  const float* scales;       // [B, T, H + G] of the features, null: 1
  const float* log_decay;    // [B, T, G]
  const float* mask;         // [B, T], 0: padding
  const float* weight;       // [d] of the group norm
  const float* bias;         // [d]
  const float* past;         // [B, G, K, K]
  float* present;            // [B, G, K, K]
  float* features;           // [B, T, (H + G) K]: room, not used by a single token
  float* attended;           // [B, T, d]: room
  void* output;              // [B, T, d | F]
};

// y = norm(a + b + bias) * weight + shift; RMS norms leave the mean out.
struct Norm {
  int width, centred;
  float epsilon;
  const float* a;       // [rows, width]
  const void* b;        // [rows, width]
  const float* weight;  // [width]
  const float* shift;   // [width], null: none
  const float* bias;    // [width], null: none
  void* output;         // [rows, width]: y
  float* sum;           // [rows, width]: a + b + bias
};

// Rotary angles.
struct Angles {
  int pairs;
  const Long* positions;      // [rows]
  const double* frequencies;  // [pairs]
  float* cos;                 // [rows, pairs]
  float* sin;
};

struct Half { unsigned short bits; };
struct Brain { unsigned short bits; };
union Bits { unsigned u; float f; };

DEVICE float number(float x) { return x; }
DEVICE float number(Brain x) {
  Bits b;
  b.u = static_cast<unsigned>(x.bits) << 16;
  return b.f;
}
DEVICE void put(float* y, float x) { *y = x; }
DEVICE void put(Brain* y, float x) {
  Bits b;
  b.f = x;
  const bool nan = (b.u & 0x7fffffffu) > 0x7f800000u;
  y->bits = nan ? 0x7fff : static_cast<unsigned short>((b.u + 0x7fffu + (b.u >> 16 & 1)) >> 16);
}
#ifdef __CUDACC_RTC__
DEVICE float number(Half x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}
DEVICE void put(Half* y, float x) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y->bits) : "f"(x)); }
#else
DEVICE float number(Half x) {
  Bits b, scale;
  b.u = (x.bits & 0x7fffu) << 13;
  scale.u = 0x77800000u;  // 2^112: the difference of the exponents' zeros
  if (b.u >= 0x0f800000u) b.u |= 0x7f800000u; else b.f *= scale.f;
  b.u |= (x.bits & 0x8000u) << 16;
  return b.f;
}
DEVICE void put(Half* y, float x) {
  Bits b, low;
  b.f = x;
  const unsigned sign = b.u >> 16 & 0x8000u;
  b.u &= 0x7fffffffu;
  unsigned short bits;
  if (b.u > 0x7f800000u) bits = 0x7fff;
  else if (b.u >= 0x477ff000u) bits = 0x7c00;  // rounds beyond the largest
  else if (b.u < 0x38800000u) {                // below 2^-14 a half has a fixed step, 2^-24
    low.u = 0x3f000000u;                       // 0.5, whose step in float32 is that
    low.f += b.f;
    bits = static_cast<unsigned short>(low.u - 0x3f000000u);
  } else bits = static_cast<unsigned short>((b.u - 0x38000000u + 0xfffu + (b.u >> 13 & 1)) >> 13);
  y->bits = static_cast<unsigned short>(sign | bits);
}
#endif

DEVICE float larger(float a, float b) { return a > b ? a : b; }

// Of all lanes of a warp, in one order, for each of them.
DEVICE float warp_sum(float x) {
#ifdef IN_THREADS
  for (int far = 16; far; far /= 2) x += __shfl_xor_sync(0xffffffffu, x, far);
#endif
  return x;
}
DEVICE float warp_max(float x) {
#ifdef IN_THREADS
  for (int far = 16; far; far /= 2) x = larger(x, __shfl_xor_sync(0xffffffffu, x, far));
#endif
  return x;
}
// Of all threads of a block, for each of them. `scratch` has 32 numbers that nothing else uses.
DEVICE float block_sum(float x, float* scratch) {
#ifdef IN_THREADS
  x = warp_sum(x);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
  SYNC();
  x = threadIdx.x % 32 < blockDim.x / 32 ? scratch[threadIdx.x % 32] : 0.0f;
  return warp_sum(x);
#else
  static_cast<void>(scratch);
  return x;
#endif
}

DEVICE float relu(float x) { return x < 0.0f ? 0.0f : x; }  // NaN stays
DEVICE float silu(float x) { return x / (1.0f + expf(-x)); }
DEVICE float gelu(float x) { return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f)); }
DEVICE float gelu_tanh(float x) {
  return 0.5f * x * (1.0f + tanhf(0.79788456080286536f * (x + 0.044715f * x * x * x)));
}
// By the number that graphs store: native/step.h. NaN for one that is missing here.
DEVICE float activated(int which, float x) {
  if (which == 1) return relu(x);
  if (which == 2) return silu(x);
  if (which == 3) return gelu(x);
  if (which == 4) return gelu_tanh(x);
  return (x - x) / (x - x);
}

DEVICE int width_of(const Step& s) { return (2 * s.heads + 2 * s.groups) * s.size + s.mlp; }

// A channel of the projections of a row, its bias added.
template <class T>
DEVICE float projected(const Step& s, Long row, int channel) {
  const float x = number(static_cast<const T*>(s.packed)[row * width_of(s) + channel]);
  return s.packed_bias ? x + s.packed_bias[channel] : x;
}

// Channel i of a head after the rotary embedding. Heads: H of the queries, then G of the keys.
template <class T>
DEVICE float rotated(const Step& s, Long row, int head, int i) {
  const int half = s.rotary / 2, from = head * s.size;
  const float x = projected<T>(s, row, from + i);
  if (i >= 2 * half) return x;
  const int pair = i < half ? i : i - half;
  const float c = s.cos[row * half + pair], n = s.sin[row * half + pair];
  return i < half ? x * c - projected<T>(s, row, from + half + i) * n
                  : x * c + projected<T>(s, row, from + pair) * n;
}

// Parts of a state's rows, each with a thread of its own a column.
DEVICE int slices_of(const Step& s) { return (s.size + kRows - 1) / kRows; }

// z[p] = heads[p] after the rotary embedding, of `count` heads.
template <class T>
DEVICE void rotate(const Step& s, Long row, const int* heads, int count, float* z) {
  EACH(o, count * s.size) z[o] = rotated<T>(s, row, heads[o / s.size], o % s.size);
}

// y[p] = softmax(z[p] P) * scale of `count` heads: heads[p]; keys take the mask too.
// partial: room for kTogether x K numbers, or for as many a thread.
DEVICE void feature_maps(const Step& s, Long row, const int* heads, int count, const float* z, float* partial,
                         float* y) {
  const int size = s.size, slices = THREADS / size < 1 ? 1 : THREADS / size, rows = (size + slices - 1) / slices;
  EACH(o, size * slices) {
    const int slice = o / size, j = o % size, from = slice * rows;
    const int end = from + rows < size ? from + rows : size;
    float sums[kTogether] = {};
    for (int first = from; first < end; first += kRows) {
      float p[kRows];
      UNROLL
      for (int i = 0; i < kRows; i++) p[i] = first + i < end ? s.projection[(first + i) * size + j] : 0.0f;
      UNROLL
      for (int i = 0; i < kRows; i++)
        if (first + i < end)
          for (int h = 0; h < kTogether; h++)
            if (h < count) sums[h] += z[h * size + first + i] * p[i];
    }
    for (int h = 0; h < kTogether; h++)
      if (h < count) partial[(h * slices + slice) * size + j] = sums[h];
  }
  SYNC();
  EACH_WARP(p, count) {
    float top = -3.402823466e38f, sum = 0.0f;
    EACH_LANE(j, size) {
      float x = 0.0f;
      for (int slice = 0; slice < slices; slice++) x += partial[(p * slices + slice) * size + j];
      y[p * size + j] = x;
      top = larger(top, x);
    }
    top = warp_max(top);
    EACH_LANE(j, size) {
      const float x = expf(y[p * size + j] - top);
      y[p * size + j] = x;
      sum += x;
    }
    float scale = s.scales ? s.scales[row * (s.heads + s.groups) + heads[p]] : 1.0f;
    if (heads[p] >= s.heads) scale *= s.mask[row];
    scale /= warp_sum(sum);
    EACH_LANE(j, size) y[p * size + j] *= scale;
  }
  SYNC();
}

// Features of all tokens. Grid: (rows, heads in lots).
template <class T>
DEVICE void features(const Step& s) {
  const int first = BLOCK(y) * kTogether, all = s.heads + s.groups, left = all - first;
  const int count = left < kTogether ? left : kTogether;
  const Long row = BLOCK(x);
  int heads[kTogether];
  for (int p = 0; p < kTogether; p++) heads[p] = first + p;
  float* z = room;
  rotate<T>(s, row, heads, count, z);
  SYNC();
  feature_maps(s, row, heads, count, z, z + kTogether * s.size, s.features + (row * all + first) * s.size);
}

// A block's share of a state: columns [from, from + columns) of unit `unit`, a thread each kRows rows of one.
struct Share {
  Long unit;
  int from, columns, slices, items;
};

DEVICE Share share_of(const Step& s) {
  Share x;
  x.unit = static_cast<Long>(BLOCK(z)) * s.groups + BLOCK(x);
  x.from = BLOCK(y) * s.columns;
  x.columns = x.from + s.columns > s.size ? s.size - x.from : s.columns;
  x.slices = slices_of(s), x.items = x.slices * x.columns;
  return x;
}

// Where row i of item o lies in a state.
DEVICE Long place_of(const Step& s, const Share& x, int o, int i) {
  return (x.unit * s.size + o / x.columns * kRows + i) * s.size + x.from + o % x.columns;
}

DEVICE bool is_row(const Step& s, const Share& x, int o, int i) { return o / x.columns * kRows + i < s.size; }

// attended = the sums over slices; partial: [tokens, heads, slices, columns] from token `row` and `head` on.
DEVICE void sum_slices(const Step& s, const Share& x, Long row, int tokens, int head, int count,
                       const float* partial) {
  EACH(o, tokens * count * x.columns) {
    const int j = o % x.columns, p = o / x.columns % count, t = o / x.columns / count;
    float sum = 0.0f;
    for (int slice = 0; slice < x.slices; slice++)
      sum += partial[((t * count + p) * x.slices + slice) * x.columns + j];
    s.attended[((row + t) * s.heads + head + p) * s.size + x.from + j] = sum;
  }
}

// The recurrence over all tokens, tile after tile. Grid: (G, parts of a state's columns, B).
template <class T>
DEVICE void recur(const Step& s) {
  const Share x = share_of(s);
  const int group = BLOCK(x), sharing = s.heads / s.groups, padded = x.slices * kRows, all = s.heads + s.groups;
  float* keys = room;                                  // [tile, padded]
  float* queries = keys + s.tile * padded;             // [tile, sharing, padded]
  float* values = queries + s.tile * sharing * padded; // [tile, columns]
  float* decays = values + s.tile * x.columns;         // [tile]
  float* partial = decays + s.tile;
  OWN(state, kRows);
  ITEMS(o, x.items) {
    for (int i = 0; i < kRows; i++) MINE(state, o)[i] = is_row(s, x, o, i) ? s.past[place_of(s, x, o, i)] : 0.0f;
  }
  for (int first = 0; first < s.tokens; first += s.tile) {
    const int tokens = s.tokens - first < s.tile ? s.tokens - first : s.tile;
    const Long row = static_cast<Long>(BLOCK(z)) * s.tokens + first;
    EACH(o, tokens * (1 + sharing) * padded) {
      const int i = o % padded, p = o / padded % (1 + sharing), t = o / padded / (1 + sharing);
      const int head = p == 0 ? s.heads + group : group * sharing + p - 1;
      const float f = i < s.size ? s.features[((row + t) * all + head) * s.size + i] : 0.0f;
      (p == 0 ? keys + t * padded : queries + (t * sharing + p - 1) * padded)[i] = f;
    }
    EACH(o, tokens * x.columns)
      values[o] = projected<T>(s, row + o / x.columns, (all + group) * s.size + x.from + o % x.columns);
    EACH(t, tokens) decays[t] = expf(s.log_decay[(row + t) * s.groups + group]);
    SYNC();
    ITEMS(o, x.items) {
      const int slice = o / x.columns, j = o % x.columns;
      float* S = MINE(state, o);
      for (int t = 0; t < tokens; t++) {
        const float *k = keys + t * padded + slice * kRows, *q = queries + t * sharing * padded + slice * kRows;
        const float decay = decays[t], v = values[t * x.columns + j];
        float sum = 0.0f;
        UNROLL
        for (int i = 0; i < kRows; i++) {
          S[i] = decay * S[i] + k[i] * v;
          sum += q[i] * S[i];
        }
        partial[(t * sharing * x.slices + slice) * x.columns + j] = sum;
        for (int p = 1; p < sharing; p++) {
          sum = 0.0f;
          UNROLL
          for (int i = 0; i < kRows; i++) sum += q[p * padded + i] * S[i];
          partial[((t * sharing + p) * x.slices + slice) * x.columns + j] = sum;
        }
      }
    }
    SYNC();
    sum_slices(s, x, row, tokens, group * sharing, sharing, partial);
  }
  ITEMS(o, x.items) {
    for (int i = 0; i < kRows; i++)
      if (is_row(s, x, o, i)) s.present[place_of(s, x, o, i)] = MINE(state, o)[i];
  }
}

// Features and recurrence of a single token. Grid as `recur`.
template <class T>
DEVICE void decode(const Step& s) {
  const Share x = share_of(s);
  const int group = BLOCK(x), sharing = s.heads / s.groups, parts = 1 + sharing, size = s.size;
  const Long row = BLOCK(z);
  float *z = room, *made = z + kTogether * size, *partial = made + kTogether * size;
  OWN(state, kRows);
  OWN(value, 1);
  ITEMS(o, x.items) {
    for (int i = 0; i < kRows; i++) MINE(state, o)[i] = is_row(s, x, o, i) ? s.past[place_of(s, x, o, i)] : 0.0f;
    MINE(value, o)[0] = projected<T>(s, row, (s.heads + s.groups + group) * size + x.from + o % x.columns);
  }
  const float decay = expf(s.log_decay[row * s.groups + group]);
  for (int first = 0; first < parts; first += kTogether) {
    const int count = parts - first < kTogether ? parts - first : kTogether, skip = first == 0;
    int heads[kTogether];
    for (int p = 0; p < kTogether; p++)
      heads[p] = first + p == 0 ? s.heads + group : group * sharing + first + p - 1;
    rotate<T>(s, row, heads, count, z);
    SYNC();
    feature_maps(s, row, heads, count, z, partial, made);
    ITEMS(o, x.items) {
      const int slice = o / x.columns, j = o % x.columns;
      float* S = MINE(state, o);
      if (skip) {
        for (int i = 0; i < kRows; i++)
          if (is_row(s, x, o, i)) {
            S[i] = decay * S[i] + made[slice * kRows + i] * MINE(value, o)[0];
            s.present[place_of(s, x, o, i)] = S[i];
          }
      }
      for (int p = skip; p < count; p++) {
        float sum = 0.0f;
        for (int i = 0; i < kRows; i++)
          if (is_row(s, x, o, i)) sum += made[p * size + slice * kRows + i] * S[i];
        partial[((p - skip) * x.slices + slice) * x.columns + j] = sum;
      }
    }
    SYNC();
    sum_slices(s, x, row, 1, group * sharing + first + skip - 1, count - skip, partial);
  }
}

// Group norm over neighbouring channels, times silu(gate); and the MLP's activation. Grid: (rows, channels).
template <class T>
DEVICE void mix(const Step& s) {
  const int n = s.heads, d = s.heads * s.size, first = BLOCK(y) * THREADS, left = d + s.mlp - first;
  const int gate = (s.heads + 2 * s.groups) * s.size, count = left < THREADS ? left : THREADS;
  const Long row = BLOCK(x);
  T* output = static_cast<T*>(s.output) + row * (d + s.mlp);
  const float* x = s.attended + row * d;
  EACH(o, count) {
    const int c = first + o;
    float y = projected<T>(s, row, gate + c);
    if (c < d) {
      // num_groups = head size: each group is `heads` channels. Squares that overflow give 1 / inf = 0.
      const float* group = x + c / n * n;
      float mean = 0.0f, squares = 0.0f;
      for (int i = 0; i < n; i++) mean += group[i];
      mean /= n;
      for (int i = 0; i < n; i++) squares += (group[i] - mean) * (group[i] - mean);
      y = silu(y) * ((x[c] - mean) * (1.0f / sqrtf(squares / n + s.epsilon)) * s.weight[c] + s.bias[c]);
    } else {
      y = activated(s.activation, y);
    }
    put(output + c, y);
  }
}

// Channels i of a row that a thread norms, and x, where its number of each is: every THREADS-th one.
#define EACH_CHANNEL(x, i, width)                                              \
  ITEMS(first, THREADS)                                                        \
  UNROLL for (int m = 0, i = first; m < kChannels; m++, i += THREADS)                 \
    if (float& x = MINE(sum, first)[m]; i < (width))

// Up to kChannels channels a thread. Grid: (rows).
template <class T>
DEVICE void add_norm(const Norm& n) {
  const Long from = static_cast<Long>(BLOCK(x)) * n.width;
  float mean = 0.0f, squares = 0.0f;
  OWN(sum, kChannels);
  EACH_CHANNEL(x, i, n.width) {
    x = n.a[from + i] + number(static_cast<const T*>(n.b)[from + i]) + (n.bias ? n.bias[i] : 0.0f);
    n.sum[from + i] = x;
    mean += x;
  }
  mean = n.centred ? block_sum(mean, room) / n.width : 0.0f;
  EACH_CHANNEL(x, i, n.width) squares += (x - mean) * (x - mean);
  const float inverse = 1.0f / sqrtf(block_sum(squares, room + 32) / n.width + n.epsilon);
  EACH_CHANNEL(x, i, n.width) {
    const float y = (x - mean) * inverse * n.weight[i];
    put(static_cast<T*>(n.output) + from + i, n.shift ? y + n.shift[i] : y);
  }
}

// cos and sin of position * frequency, in float64 so that no position is too far. Grid: (rows).
DEVICE void angles(const Angles& a) {
  EACH(i, a.pairs) {
    const double angle = static_cast<double>(a.positions[BLOCK(x)]) * a.frequencies[i];
    a.cos[static_cast<Long>(BLOCK(x)) * a.pairs + i] = static_cast<float>(::cos(angle));
    a.sin[static_cast<Long>(BLOCK(x)) * a.pairs + i] = static_cast<float>(::sin(angle));
  }
}

// Every kernel in every type: KERNELS(float, _fp32) defines features_fp32 and so on.
#define KERNELS(T, suffix)                                          \
  KERNEL features##suffix(const Step s) { features<T>(s); }         \
  KERNEL recur##suffix(const Step s) { recur<T>(s); }               \
  KERNEL decode##suffix(const Step s) { decode<T>(s); }             \
  KERNEL mix##suffix(const Step s) { mix<T>(s); }                   \
  KERNEL add_norm##suffix(const Norm n) { add_norm<T>(n); }
KERNELS(float, _fp32)
KERNELS(Half, _fp16)
KERNELS(Brain, _bf16)
KERNEL angles_fp32(const Angles a) { angles(a); }
