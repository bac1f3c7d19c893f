"""Hypothesis strategy for models of every shape that a tape must hold."""

from __future__ import annotations

from hypothesis import strategies as st

from jax_monokernel import DecoderSpec, LayerSpec, RopeSpec
from jax_monokernel.plan import Plan, geometry


@st.composite
def specs(draw: st.DrawFn) -> DecoderSpec:
    """Small models with sizes that do not fit tiles, and every combination of optional parts."""
    head_dim = draw(st.integers(2, 11))
    kv_heads = draw(st.integers(1, 3))
    rotary_dim = draw(st.sampled_from(range(2, head_dim + 1, 2)))
    ropes = draw(
        st.lists(
            st.sampled_from(
                [
                    RopeSpec(theta=100.0, rotary_dim=rotary_dim),
                    RopeSpec(theta=1e4, rotary_dim=rotary_dim, scaling="linear", factor=3.0),
                    RopeSpec(
                        theta=100.0,
                        rotary_dim=rotary_dim,
                        scaling="longrope",
                        original_max_position=8,
                        short_factor=(1.5,) * (rotary_dim // 2),
                        long_factor=(3.0,) * (rotary_dim // 2),
                    ),
                ]
            ),
            max_size=3,
        )
    )
    layer = LayerSpec(rope=0 if ropes else None)
    return DecoderSpec(
        vocab_size=draw(st.integers(1, 70)),
        hidden_size=draw(st.integers(1, 40)),
        intermediate_size=draw(st.integers(1, 40)),
        num_heads=kv_heads * draw(st.integers(1, 3)),
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        layers=(layer,) * draw(st.integers(1, 3)),
        ropes=tuple(ropes),
        pre_norm=draw(st.booleans()),
        post_norm=draw(st.booleans()),
        qk_norm=draw(st.sampled_from([None, "head", "full"])),
        qkv_bias=draw(st.booleans()),
        o_bias=draw(st.booleans()),
        mlp_bias=draw(st.booleans()),
        gated=draw(st.booleans()),
        tied_head=draw(st.booleans()),
        dtype=draw(st.sampled_from(["bfloat16", "float16", "float32"])),
    )


def fits(spec: DecoderSpec, plan: Plan) -> bool:
    """Whether each of the plan's groups has tiles."""
    try:
        geometry(spec, plan)
    except ValueError:
        return False
    return True
