"""Activations and their derivatives: elementwise functions of v = scale * (x - mean) + shift + residual, in
v's type.

ACT is an epilogue.Activation, a compile-time constant. At corners and at NaN they return what torch
returns."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .memory import read


class Affine(NamedTuple):
    """The coefficients of scale * (x - mean) + shift."""

    mean: Any
    scale: Any
    shift: Any


@triton.jit
def tanh(v):
    """Near 0 this is a rational function (Cephes), which keeps the digits that 1 - 2 / (exp(2 v) + 1)
    loses."""
    s = v * v
    above = (-0.964399179425052238628 * s - 99.2877231001918586564) * s - 1614.68768441708447952
    below = ((s + 112.811678491632931402) * s + 2235.48839060100448583) * s + 4844.06305325125486048
    near = v + v * s * (above / below)
    far = 1.0 - 2.0 / (tl.exp(2.0 * tl.abs(v)) + 1.0)
    return tl.where(tl.abs(v) < 0.625, near, tl.where(v < 0, -far, far))


@triton.jit
def sigmoid(v):
    return 1.0 / (1.0 + tl.exp(-v))


@triton.jit
def exp_minus_1(v):
    """For v <= 0. Near 0 this is a series, which keeps the digits that exp(v) - 1 loses."""
    TERMS: tl.constexpr = 15 if v.dtype == tl.float64 else 8  # the next is below half a unit of the first
    near = 1.0 + v * (1.0 / TERMS)
    for k in tl.static_range(TERMS - 1, 1, -1):
        near = 1.0 + near * (v * (1.0 / k))
    return tl.where(v > -0.5, v * near, tl.exp(v) - 1.0)


@triton.jit
def tanh_of_softplus(v):
    """tanh(log(1 + exp(v))) without a logarithm; above 20 it is 1 in every type."""
    e = tl.exp(tl.where(v < 20.0, v, 20.0))
    n = e * (e + 2.0)
    return n / (n + 2.0)


@triton.jit
def normal_cdf(v):
    return 0.5 * (1.0 + tl.erf(v * 0.7071067811865476))  # sqrt(1 / 2)


@triton.jit
def gelu_exponent(v):
    """u = 2 sqrt(2 / pi) (v + 0.044715 v^3), Hendrycks and Gimpel 2016, arXiv 1606.08415, whose
    (1 + tanh(u / 2)) / 2 is sigmoid(u)."""
    return v * (1.5957691216057308 + 0.07135481627260025 * v * v)


@triton.jit
def activate(v, ACT: tl.constexpr):
    if ACT.name == "none":
        y = v
    elif ACT.name == "relu":
        y = tl.where(v <= 0, 0.0, v)
    elif ACT.name == "relu6":
        y = tl.where(v <= 0, 0.0, tl.where(v >= 6.0, 6.0, v))
    elif ACT.name == "leaky_relu":
        y = tl.where(v > 0, v, ACT.parameter * v)
    elif ACT.name == "elu":
        y = tl.where(v > 0, v, ACT.parameter * exp_minus_1(v))
    elif ACT.name == "silu":
        y = v * sigmoid(v)
    elif ACT.name == "gelu":
        y = v * normal_cdf(v)
    elif ACT.name == "gelu_tanh":
        y = v * sigmoid(gelu_exponent(v))
    elif ACT.name == "hardswish":
        y = v * (tl.where(v <= -3.0, 0.0, tl.where(v >= 3.0, 6.0, v + 3.0)) / 6.0)
    elif ACT.name == "hardsigmoid":
        y = tl.where(v <= -3.0, 0.0, tl.where(v >= 3.0, 6.0, v + 3.0)) / 6.0
    elif ACT.name == "mish":
        y = v * tanh_of_softplus(v)
    elif ACT.name == "sigmoid":
        y = sigmoid(v)
    else:
        tl.static_assert(ACT.name == "tanh")
        y = tanh(v)
    return y


@triton.jit
def times_slope(g, v, ACT: tl.constexpr):
    """g times the slope of `activate` at v. Where the slope is 0 the result is 0 even if g is infinite, as in
    torch."""
    if ACT.name == "relu":
        d = tl.where(v <= 0, 0.0, g)
    elif ACT.name == "relu6":
        d = tl.where((v <= 0) | (v >= 6.0), 0.0, g)
    elif ACT.name == "leaky_relu":
        d = tl.where(v > 0, g, ACT.parameter * g)
    elif ACT.name == "elu":
        d = tl.where(v <= 0, g * (ACT.parameter * tl.exp(v)), g)
    elif ACT.name == "silu":
        s = sigmoid(v)
        d = g * (s * (1.0 + v * (1.0 - s)))
    elif ACT.name == "gelu":
        d = g * (normal_cdf(v) + v * 0.3989422804014327 * tl.exp(-0.5 * v * v))  # 1 / sqrt(2 pi)
    elif ACT.name == "gelu_tanh":
        s = sigmoid(gelu_exponent(v))
        d = g * (s + s * (1.0 - s) * v * (1.5957691216057308 + 0.21406444881780074 * v * v))
    elif ACT.name == "hardswish":
        d = tl.where(v <= -3.0, 0.0, tl.where(v < 3.0, g * (v / 3.0 + 0.5), g))
    elif ACT.name == "hardsigmoid":
        d = tl.where((v > -3.0) & (v < 3.0), g / 6.0, 0.0)
    elif ACT.name == "mish":
        t = tanh_of_softplus(v)
        d = g * (t + v * sigmoid(v) * (1.0 - t * t))
    elif ACT.name == "sigmoid":
        s = sigmoid(v)
        d = g * (s * (1.0 - s))
    else:
        tl.static_assert(ACT.name == "tanh")
        t = tanh(v)
        d = g * (1.0 - t * t)
    return d


@triton.jit
def before_activation(g, x, affine, residual_ptr, offs, mask, ACT: tl.constexpr, ACC: tl.constexpr):
    """g, the gradient of act(v) -> that of v, which is recomputed from x. affine: an Affine. residual_ptr:
    the address that offs count from, or None."""
    v = affine.scale * (x.to(ACC) - affine.mean) + affine.shift
    if residual_ptr is not None:
        v += read(residual_ptr + offs, mask).to(ACC)
    return times_slope(g.to(ACC), v, ACT)


@triton.jit
def pack(positive):
    """[R, LANES] of booleans -> [R, LANES // 8] bytes, the first element in the lowest bit."""
    bits = tl.reshape(positive.to(tl.int32), (positive.shape[0], positive.shape[1] // 8, 8))
    return tl.sum(bits << tl.arange(0, 8)[None, None, :], 2).to(tl.uint8)


@triton.jit
def unpack(bytes):
    """The reverse of `pack`."""
    bits = (bytes.to(tl.int32)[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
    return tl.reshape(bits, (bytes.shape[0], bytes.shape[1] * 8)) != 0
