// Numbers as registers hold them: 64 bits, of which narrower types use the lowest.
#include <math.h>
#include <stdint.h>
#include <string.h>

typedef int16_t i16;
typedef int32_t i32;
typedef int64_t i64;
typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;

static inline float F(u64 x) { u32 low = (u32)x; float f; memcpy(&f, &low, 4); return f; }
static inline double D(u64 x) { double f; memcpy(&f, &x, 8); return f; }
// The hardware's arithmetic has one NaN, whatever the NaNs that it is given.
static inline u32 fbits(float f) { u32 x; memcpy(&x, &f, 4); return f == f ? x : 0x7fffffffu; }
static inline u64 dbits(double f) { u64 x; memcpy(&x, &f, 8); return f == f ? x : 0xfff8000000000000ull; }
static inline float ftz(float f) { return fabsf(f) < 0x1p-126f ? copysignf(0.0f, f) : f; }

// Rounded to nearest even; all NaNs become the one that the hardware gives.
static inline u16 to_bfloat(float f) {
  u32 x = fbits(f);
  return f != f ? 0x7fff : (u16)((x + 0x7fff + (x >> 16 & 1)) >> 16);
}
// Not by _Float16, which gcc 11 does not have. A double holds the float, and what is added to round, exactly.
static inline u16 to_half(float f) {
  u16 sign = (fbits(f) >> 16) & 0x8000;
  double size = fabs((double)f);
  if (f != f) return 0x7fff;
  if (size >= 65520) return sign | 0x7c00;
  int exponent = size < 0x1p-14 ? -14 : ilogb(size);  // 10 bits behind the first, fewer of subnormals
  double units = rint(ldexp(size, 10 - exponent));
  return sign | (u16)((exponent + 14) * 1024 + (i32)units);
}
static inline float of_half(u16 x) {
  int exponent = x >> 10 & 31, fraction = x & 1023;
  float size = exponent ? ldexpf(1024 + fraction, exponent - 25) : ldexpf(fraction, -24);
  if (exponent == 31) size = fraction ? NAN : INFINITY;
  return x & 0x8000 ? -size : size;
}

// a * b + c, rounded towards minus infinity. A double has the product exactly; `lost` is what the sum rounds away.
static inline float fma_down(float a, float b, float c) {
  double product = (double)a * b, sum = product + c, other = sum - product, lost = (product - (sum - other)) + (c - other);
  float near = (float)sum;
  if (!isfinite(sum)) return (float)sum;
  if (sum == 0) return signbit(product) || signbit(c) ? -0.0f : 0.0f;
  return (double)near > sum || ((double)near == sum && lost < 0) ? nextafterf(near, -INFINITY) : near;
}

// -0 is less than +0, and a number is preferred to a NaN.
static inline float least(float a, float b) { return a == b ? (signbit(a) ? a : b) : fminf(a, b); }
static inline float most(float a, float b) { return a == b ? (signbit(a) ? b : a) : fmaxf(a, b); }
static inline double least_d(double a, double b) { return a == b ? (signbit(a) ? a : b) : fmin(a, b); }
static inline double most_d(double a, double b) { return a == b ? (signbit(a) ? b : a) : fmax(a, b); }

// A rounded number as 32 bits: the nearest that there is, 0 for NaN.
static inline u32 to_s32(double x) {
  return x != x ? 0 : x >= 0x1p31 ? 0x7fffffffu : x <= -0x1p31 ? 0x80000000u : (u32)(i32)x;
}

static inline u64 bit_field(u64 x, u32 start, u32 length, u32 width, int is_signed) {
  start &= 255, length &= 255;
  u32 top = start + length - 1 < width - 1 ? start + length - 1 : width - 1;
  u64 sign = is_signed && length ? x >> top & 1 : 0;
  u64 field = start < width ? x >> start : 0, kept = start < width ? top - start + 1 : 0;
  if (length == 0) return 0;
  if (kept >= 64) return field;
  return (field & ((1ull << kept) - 1)) | (sign ? ~0ull << kept : 0);
}

static inline u32 permute_bytes(u32 a, u32 b, u32 selector) {
  u64 bytes = (u64)b << 32 | a;
  u32 result = 0;
  for (int i = 0; i < 4; i++) {
    u32 choice = selector >> 4 * i & 15, byte = bytes >> 8 * (choice & 7) & 255;
    if (choice & 8) byte = byte & 128 ? 255 : 0;  // the sign, repeated
    result |= byte << 8 * i;
  }
  return result;
}

// Comparisons are numbered as program.py numbers them; UNORDERED is added where NaN makes them true.
enum { EQ, NE, LT, LE, GT, GE, ONE_NAN, NO_NAN, UNORDERED = 16 };
#define COMPARE(NAME, TYPE)                                                 \
  static inline u64 NAME(TYPE a, TYPE b, i32 comparison) {                  \
    int nan = a != a || b != b;                                             \
    if (nan && comparison & UNORDERED) return 1;                            \
    switch (comparison & 15) {                                              \
      case EQ: return a == b;                                               \
      case NE: return !nan && a != b;                                       \
      case LT: return a < b;                                                \
      case LE: return a <= b;                                               \
      case GT: return a > b;                                                \
      case GE: return a >= b;                                               \
      case ONE_NAN: return nan;                                             \
      default: return !nan;                                                 \
    }                                                                       \
  }
COMPARE(compare_float, float)
COMPARE(compare_double, double)
COMPARE(compare_signed, i64)
COMPARE(compare_unsigned, u64)

static inline u64 random_bits(u64 *state) {  // splitmix64
  u64 z = (*state += 0x9e3779b97f4a7c15ull);
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ z >> 27) * 0x94d049bb133111ebull;
  return z ^ z >> 31;
}
