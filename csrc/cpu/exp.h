// e^v and the sigmoid. Included by instruction_set.h after vec.h.

// e^x for |x| <= ½ ln 2, times 2^n, where `shifted` is n + 1.5 · 2^52.
INLINE F64 scaled_exp(F64 x, F64 shifted) {
  F64 series = F64{} + 1;
#pragma GCC unroll 13
  for (int k = 13; k > 0; --k) {
    series = series * (x * (1.0 / k)) + 1;
  }
  const U64 scale = (reinterpret_cast<U64>(shifted) << 52) + 0x3ff0000000000000ull;
  return series * reinterpret_cast<F64>(scale);
}

// e^v; infinite where that is 2^127.5 or more.
INLINE F32 exp_of(F32 v) {
  v = v > 89.0f ? F32{} + 89.0f : v;
  v = v < -87.0f ? F32{} - 87.0f : v;
  const F32 shifted = v * 1.44269504f + 0x1.8p23f;  // leaves the nearest integer in the low bits
  const F32 whole = shifted - 0x1.8p23f;
  const F32 x = (v - whole * 0.693145752f) - whole * 1.42860677e-6f;
  F32 series = F32{} + 1.0f / 5040;
  series = series * x + 1.0f / 720;
  series = series * x + 1.0f / 120;
  series = series * x + 1.0f / 24;
  series = series * x + 1.0f / 6;
  series = series * x + 0.5f;
  series = series * x + 1.0f;
  series = series * x + 1.0f;
  const U32 scale = (reinterpret_cast<U32>(shifted) << 23) + 0x3f800000u;
  return series * reinterpret_cast<F32>(scale);
}

// As above; infinite where it is 2^1023.5 or more.
INLINE F64 exp_of(F64 v) {
  v = v > 710.0 ? F64{} + 710.0 : v;
  v = v < -708.0 ? F64{} - 708.0 : v;
  const F64 shifted = v * 1.44269504088896340736 + 0x1.8p52;
  const F64 whole = shifted - 0x1.8p52;
  return scaled_exp((v - whole * 0.69314718036912381649) - whole * 1.9082149292705877e-10, shifted);
}

template <typename V>
INLINE V sigmoid(V z) {
  return 1 / (1 + exp_of(-z));
}
