"""Activations and their derivatives: elementwise functions of v = scale * (x - mean) + shift + residual, in
v's type.

ACT is an epilogue.Activation, a compile-time constant. At corners and at NaN they return what torch
returns."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .memory import read

SIXTH = tl.constexpr(1 / 6)


class Affine(NamedTuple):
    """The coefficients of scale * (x - mean) + shift."""

    mean: Any
    scale: Any
    shift: Any


@triton.jit
def exp(v, TIMES: tl.constexpr = 1.0):
    """e^(TIMES * v). In fp32 it is 2 to the power of a rounded product, two instructions, which is off by up
    to (1/2 + 1/9) * |v| units; a result below 1e-38 is 0."""
    if v.dtype == tl.float64:
        power = tl.exp(TIMES * v)
    else:
        power = tl.exp2(v * (TIMES * 1.4426950408889634))  # log2(e)
    return power


@triton.jit
def reciprocal(v):
    """1 / v for v >= 1. In fp32 two instructions, off by up to 2.7 units, where a division takes eight."""
    if v.dtype == tl.float64:
        inverse = 1.0 / v
    else:
        root = tl.rsqrt(v)
        inverse = root * root
    return inverse


@triton.jit
def tanh_near_0(v):
    """For |v| < 0.625, where 1 - 2 / (exp(2 v) + 1) loses digits: in fp64 a rational function (Cephes), else
    a polynomial."""
    s = v * v
    if v.dtype == tl.float64:
        above = (-0.964399179425052238628 * s - 99.2877231001918586564) * s - 1614.68768441708447952
        below = ((s + 112.811678491632931402) * s + 2235.48839060100448583) * s + 4844.06305325125486048
        ratio = above / below
    else:
        ratio = (0.020639019 - 0.0057049082 * s) * s - 0.053739697
        ratio = (ratio * s + 0.13331442) * s - 0.33333281
    return v + v * s * ratio


@triton.jit
def tanh(v):
    far = 1.0 - 2.0 * reciprocal(1.0 + exp(tl.abs(v), 2.0))
    return tl.where(tl.abs(v) < 0.625, tanh_near_0(v), tl.where(v < 0, -far, far))


@triton.jit
def sigmoid(v):
    return reciprocal(1.0 + exp(v, -1.0))


@triton.jit
def sigmoid_slope(v):
    """sigmoid(v) * (1 - sigmoid(v)), with the digits that 1 - sigmoid(v) loses."""
    e = exp(tl.abs(v), -1.0)
    r = reciprocal(1.0 + e)
    return e * r * r


@triton.jit
def exp_minus_1(v):
    """For v <= 0. Near 0 this is a polynomial, which keeps the digits that exp(v) - 1 loses."""
    if v.dtype == tl.float64:
        near = 1.0 + v * (1.0 / 15)
        for k in tl.static_range(14, 1, -1):  # the next term is below half a unit of the first
            near = 1.0 + near * (v * (1.0 / k))
    else:
        near = (0.0011259147 * v + 0.0081932861) * v + 0.041632045
        near = ((near * v + 0.16666289) * v + 0.49999985) * v + 1.0
    return tl.where(v > -0.5, v * near, exp(v) - 1.0)


@triton.jit
def normal_tail(v):
    """For fp32: two factors of the normal distribution at -|v|, e^(-v^2 / 2) and a polynomial of
    1 / (1 + |v| / 2). Their product is off by less than 4e-7."""
    power = exp(v * v, -0.5)
    t = reciprocal(1.0 + 0.5 * tl.abs(v))
    times = ((0.2105238 - 0.0436468981 * t) * t - 0.355292469) * t + 0.144595534
    times = ((times * t + 0.15152517) * t + 0.191475898) * t + 0.200818956
    return power, t * times


@triton.jit
def normal(v):
    """The normal distribution."""
    if v.dtype == tl.float64:
        below = 0.5 * (1.0 + tl.erf(v * 0.7071067811865476))  # sqrt(1 / 2)
    else:
        power, times = normal_tail(v)
        tail = power * times
        below = tl.where(v > 0, 1.0 - tail, tail)
    return below


@triton.jit
def gelu_slope(v):
    """normal(v) + v e^(-v^2 / 2) / sqrt(2 pi). Its values at v and at -v add up to 1: in fp32 that at -|v| is
    found, which takes fewer registers than the two terms do."""
    if v.dtype == tl.float64:
        slope = normal(v) + v * (0.3989422804014327 * exp(v * v, -0.5))
    else:
        power, times = normal_tail(v)
        tail = power * (times - 0.3989422804014327 * tl.abs(v))
        slope = tl.where(v > 0, 1.0 - tail, tail)
    return slope


@triton.jit
def exp_of_gelu(v):
    """exp(-u), u = 2 sqrt(2 / pi) (v + 0.044715 v^3), Hendrycks and Gimpel 2016, arXiv 1606.08415, whose
    (1 + tanh(u / 2)) / 2 is sigmoid(u). The constants have log2(e) in them."""
    return tl.exp2(-v * (2.302208198144325 + 0.1029432395800235 * v * v))


@triton.jit
def at_least(v, LEAST: tl.constexpr):
    """max(v, LEAST) that keeps NaN."""
    return tl.maximum(v, LEAST, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def at_most(v, MOST: tl.constexpr):
    """min(v, MOST) that keeps NaN."""
    return tl.minimum(v, MOST, propagate_nan=tl.PropagateNan.ALL)


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
        y = v * normal(v)
    elif ACT.name == "gelu_tanh":
        y = v * reciprocal(1.0 + exp_of_gelu(v))
    elif ACT.name == "hardswish":
        y = v * (tl.where(v <= -3.0, 0.0, tl.where(v >= 3.0, 6.0, v + 3.0)) * SIXTH)
    elif ACT.name == "hardsigmoid":
        y = tl.where(v <= -3.0, 0.0, tl.where(v >= 3.0, 6.0, v + 3.0)) * SIXTH
    elif ACT.name == "mish":
        # t, tanh(log(1 + e)), without a logarithm; above 20 it is 1 in every type
        e = exp(at_most(v, 20.0))
        n = e * (e + 2.0)
        y = v * (n * reciprocal(n + 2.0))
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
        d = tl.where(v <= 0, g * (ACT.parameter * exp(v)), g)
    elif ACT.name == "silu":
        # s (1 + v (1 - s)), s the sigmoid, whose 1 - s is e s. Below -87 the slope is 0 and e infinite.
        v = at_least(v, -87.0)
        e = exp(v, -1.0)
        s = reciprocal(1.0 + e)
        d = g * (s * (1.0 + v * (e * s)))
    elif ACT.name == "gelu":
        d = g * gelu_slope(v)
    elif ACT.name == "gelu_tanh":
        # as of silu, times the slope of u
        v = at_least(v, -9.0)
        e = exp_of_gelu(v)
        s = reciprocal(1.0 + e)
        d = g * (s * (1.0 + v * (e * s) * (1.5957691216057308 + 0.21406444881780074 * v * v)))
    elif ACT.name == "hardswish":
        d = tl.where(v <= -3.0, 0.0, tl.where(v < 3.0, g * (v * (2.0 * SIXTH) + 0.5), g))
    elif ACT.name == "hardsigmoid":
        d = tl.where((v > -3.0) & (v < 3.0), g * SIXTH, 0.0)
    elif ACT.name == "mish":
        v = at_most(v, 20.0)
        e = exp(v)
        r = reciprocal(e * (e + 2.0) + 2.0)
        # the slope of t (see activate) is 4 e (1 + e) r^2; with e apart from the rest nothing spills [sass]
        d = g * (r * (e * (e + 2.0 + 4.0 * r * (v * (1.0 + e)))))
    elif ACT.name == "sigmoid":
        d = g * sigmoid_slope(v)
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
