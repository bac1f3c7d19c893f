"""The peers that need nothing but this package: `decode`, and the loop that a JAX user would write."""

from __future__ import annotations

from jax_monokernel._bench.jax_loop import JaxLoop, not_covered
from jax_monokernel._bench.ours import Ours
from jax_monokernel._bench.runner import Peer, Workload, make_prompt
from jax_monokernel.plan import Plan
from jax_monokernel.spec import DecoderSpec
from jax_monokernel.weights import DecoderWeights

PEERS = ("ours", "jax_loop")


def make_peers(
    spec: DecoderSpec, weights: DecoderWeights, workload: Workload, names: list[str], plan: Plan | None = None
) -> dict[str, Peer]:
    """The peers with these names, ready to be measured.

    Raises:
      ValueError: an unknown name, or a model that the JAX loop cannot decode.
    """
    prompt = make_prompt(workload.batch, workload.prompt_tokens, spec.vocab_size)
    made: dict[str, Peer] = {}
    for name in names:
        if name == "ours":
            made[name] = Ours(spec, weights, prompt, workload.new_tokens, plan=plan)
        elif name == "jax_loop":
            if part := not_covered(spec):
                raise ValueError(f"the jitted JAX loop knows no {part}; leave jax_loop out for this model")
            made[name] = JaxLoop(spec, weights, prompt, workload.new_tokens)
        else:
            raise ValueError(f"unknown peer {name!r}; expected one of {', '.join(PEERS)}")
    return made
