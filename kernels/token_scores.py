"""What the kernels of the choice of a token share: reading logits by fours, the noise, and the better of two tokens.

Four neighbouring tokens, a *quad*, share a counter of Philox; a kernel holds them as four tensors of the same shape.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_quads(row_ptr, quad, V):
    """Logits in f32 of the tokens 4 * quad + 0..3, quad [Q]; -inf from V on. One load of neighbours."""
    token = quad[:, None] * 4 + tl.arange(0, 4)[None, :]
    logits = tl.load(row_ptr + token, mask=token < V, other=-float("inf")).to(tl.float32)
    even, odd = tl.split(tl.reshape(logits, [quad.shape[0], 2, 2]))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


# The interpreter has no assembly.
HARDWARE_LOGARITHM = tl.constexpr(not triton.knobs.runtime.interpret)


@triton.jit
def _log2(x):
    """To 2^-22 of the result, between 0.5 and 2 to an absolute 2^-22: a sixth of the instructions of `tl.log2`."""
    if HARDWARE_LOGARITHM:
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.log2(x)


@triton.jit
def _gumbel(word):
    """-log(-log1p(-v)) of v = (word + 0.5) × 2^-32; word uint32."""
    v = tl.minimum((word.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.99999994)
    # Near 0 the logarithm of 1 - v has lost v's digits: its series has them, to 2e-7 of the value.
    series = v * (1.0 + v * (0.5 + v * (0.33333333 + v * (0.25 + v * 0.2))))
    exponential = tl.where(v < 0.0625, series, -0.6931471805599453 * _log2(1.0 - v))
    return -0.6931471805599453 * _log2(exponential)


@triton.jit
def noises(quad, seed, position, choice):
    """Gumbel noise of the four tokens of each quad; see `Ops.sample` for the counter."""
    counter = quad.to(tl.uint32, bitcast=True)
    nothing = counter * 0
    word_0, word_1, word_2, word_3 = tl.philox(
        seed,
        counter,
        nothing + position.to(tl.uint32, bitcast=True),
        nothing + choice.to(tl.uint32, bitcast=True),
        nothing,
    )
    return _gumbel(word_0), _gumbel(word_1), _gumbel(word_2), _gumbel(word_3)


@triton.jit
def _better(best, best_token, score, token):
    """The larger score with its token; the lower token of equals is `best_token`."""
    return tl.maximum(best, score), tl.where(score > best, token, best_token)


@triton.jit
def best_of_quads(quad, score_0, score_1, score_2, score_3, V):
    """(greatest score, its token, the lowest of equals). A row of NaN gives a valid token all the same."""
    best, token = _better(score_0, quad * 4, score_1, quad * 4 + 1)
    best, token = _better(best, token, score_2, quad * 4 + 2)
    best, token = _better(best, token, score_3, quad * 4 + 3)
    greatest = tl.max(best, 0)
    return greatest, tl.minimum(tl.min(tl.where(best == greatest, token, V - 1), 0), V - 1)


@triton.jit
def noisy_best(quad, logits_0, logits_1, logits_2, logits_3, lowest, scale, seed, position, choice, V):
    """Best of logit × scale + noise among the quads' tokens with logit ≥ lowest."""
    noise_0, noise_1, noise_2, noise_3 = noises(quad, seed, position, choice)
    nothing = -float("inf")
    score_0 = tl.where(logits_0 >= lowest, logits_0 * scale + noise_0, nothing)
    score_1 = tl.where(logits_1 >= lowest, logits_1 * scale + noise_1, nothing)
    score_2 = tl.where(logits_2 >= lowest, logits_2 * scale + noise_2, nothing)
    score_3 = tl.where(logits_3 >= lowest, logits_3 * scale + noise_3, nothing)
    return best_of_quads(quad, score_0, score_1, score_2, score_3, V)


@triton.jit
def best_of_parts(best_ptr, token_ptr, parts, BLOCK: tl.constexpr):
    """(score, token) of the best of a row's parts, the lowest token of equals; NaN gives some part's token."""
    part = tl.arange(0, BLOCK)
    inside = part < parts
    best = tl.load(best_ptr + part, mask=inside, other=-float("inf"))
    token = tl.load(token_ptr + part, mask=inside, other=2147483647)
    greatest = tl.max(best, 0)
    lowest = tl.min(tl.where(best == greatest, token, 2147483647), 0)
    # Only NaN compares equal to nothing.
    return greatest, tl.where(lowest == 2147483647, tl.min(token, 0), lowest)


@triton.jit
def inverse_temperature(temperature):
    """1 / temperature, kept finite: the least temperatures choose as greedily as f32 can."""
    return tl.minimum(1.0 / temperature, 1e30)


@triton.jit
def ordered_key(x):
    """int32 that compares as the f32 does (-0 and 0 apart)."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)
