"""What this vLLM, as it was started, can and cannot do for a steered request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trimtab.serving.engines.base import Request
from trimtab.steering.errors import SpecError
from trimtab.steering.plan import Plan


@dataclass(frozen=True)
class Support:
    """Limits that follow from vLLM's options.

    Attributes:
        n_stages: pipeline stages.
        n_drafts: tokens guessed ahead by speculative decoding.
        knows_tokens: whether the host knows a step's tokens when it plans it.
        max_pass: most tokens of one forward pass.
        sentences: what was chosen, for people.
    """

    n_stages: int
    n_drafts: int
    knows_tokens: bool
    max_pass: int
    sentences: dict[str, str]

    @classmethod
    def of(cls, config: Any, facts: Sequence[Mapping[str, Any]]) -> Support:
        """Read them from vLLM's configuration and the workers' own words."""
        import vllm

        parallel, scheduler = config.parallel_config, config.scheduler_config
        speculative = config.speculative_config
        n_drafts = 0 if speculative is None else int(speculative.num_speculative_tokens or 0)
        mode = config.compilation_config.mode
        sentences = {
            "engine": (
                f"vLLM {vllm.__version__}, {facts[0]['runner']} model runner, "
                f"{len(facts)} worker{'s' * (len(facts) > 1)}, compilation {mode.name.lower()}"
            ),
            "device": str(config.device_config.device_type),
            "dtype": str(config.model_config.dtype).removeprefix("torch."),
            "batching": (
                f"up to {scheduler.max_num_seqs} sequences and "
                f"{scheduler.max_num_batched_tokens} tokens a pass"
            ),
            "prefix cache": "on" if config.cache_config.enable_prefix_caching else "off",
        }
        return cls(
            n_stages=int(parallel.pipeline_parallel_size),
            n_drafts=n_drafts,
            knows_tokens=all(rank["knows_tokens"] for rank in facts),
            max_pass=int(scheduler.max_num_batched_tokens),
            sentences=sentences,
        )

    def check(self, request: Request) -> None:
        """Refuse what cannot be done right, with the reason.

        Raises:
            SpecError: with the field at fault.
        """
        if request.probes:
            self._check_probes()
        if request.plan is not None and request.plan.parts:
            self.check_plan(request.plan, n_prompt=len(request.prompt_ids))

    def _check_probes(self) -> None:
        if self.n_drafts:
            raise SpecError(
                "probes cannot be read with speculative decoding: a step may make several tokens.",
                param="probes",
            )
        if self.n_stages > 1:
            raise SpecError(
                "probes cannot be read with pipeline parallelism: only the last stage answers.",
                param="probes",
            )

    def check_plan(self, plan: Plan, *, n_prompt: int, path: str = "steering") -> None:
        """Refuse steering that cannot be done right, with the reason.

        Args:
            plan: the request's.
            n_prompt: length of its prompt in tokens.
            path: JSON path of the steering in the request.

        Raises:
            SpecError: with the field at fault.
        """
        gates = [part.gate for part in plan.parts if part.gate is not None]
        if gates and self.n_stages > 1:
            raise SpecError(
                f"{path}.when cannot be used with pipeline parallelism: a gate read in one stage "
                "would have to open in another.",
                param=f"{path}.when",
            )
        if any(not gate.per_prompt for gate in gates) and self.n_drafts and not self.knows_tokens:
            raise SpecError(
                f"{path}.when cannot be counted with speculative decoding and asynchronous "
                "scheduling together; serve with --no-async-scheduling.",
                param=f"{path}.when",
            )
        if plan.needs_whole_prompt and n_prompt > self.max_pass:
            raise SpecError(
                f"A gate that reads the whole prompt needs its {n_prompt} tokens in one pass, "
                f"which holds {self.max_pass}; serve with a larger --max-num-batched-tokens.",
                param=f"{path}.when",
            )
        windows = [part.window for part in plan.parts]
        if any(w.thinking != w.generation for w in windows) and (
            not self.knows_tokens or self.n_drafts
        ):
            raise SpecError(
                "apply.thinking needs vLLM to know a step's tokens when it plans it; serve with "
                "--no-async-scheduling, without speculative decoding, on the first model runner.",
                param=f"{path}.vectors",
            )
        is_counting = any(w.first is not None or w.after for w in windows)
        if is_counting and self.n_drafts and not self.knows_tokens:
            raise SpecError(
                "apply.first and apply.after cannot be counted with speculative decoding and "
                "asynchronous scheduling together; serve with --no-async-scheduling.",
                param=f"{path}.vectors",
            )
