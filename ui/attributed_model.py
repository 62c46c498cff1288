"""A model in this process that is asked, and answers where no answer is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from trimtab.attribution.attribute import attribute
from trimtab.attribution.errors import AttributionError
from trimtab.attribution.objective import Objective, without_end_marks
from trimtab.attribution.prompt import Prompt, prompt_from_messages, prompt_from_text
from trimtab.attribution.result import Attribution
from trimtab.attribution.subject import Subject
from trimtab.steering.compile import Limits, compile_plan
from trimtab.steering.model.loading import load_model
from trimtab.steering.model.profile import profile_model
from trimtab.steering.plan import Plan
from trimtab.steering.spec import SteeringSpec
from trimtab.training.scoring import generate
from trimtab.training.steered_model import SteeredModel
from trimtab.ui.attribution_question import Question
from trimtab.ui.stores import store_of


class AttributedModel:
    """A loaded model, as it is or steered.

    Args:
        model, device, dtype: as `load_model` takes them.
        spec: what steers it; None leaves it as it is.
        any_dose: lift the limit on the relative dose.

    Attributes:
        plan: its compiled steering, or None.

    Raises:
        ModelLoadError: it cannot be loaded.
        SpecError: the spec does not fit it.
    """

    def __init__(
        self, model: str, *, device: str, dtype: str, spec: SteeringSpec | None, any_dose: bool
    ) -> None:
        self._loaded = load_model(model, device=device, dtype=dtype)
        self._tokenizer = self._loaded.tokenizer
        self._profile = profile_model(
            self._loaded.model, model_id=self._loaded.id, tokenizer=self._tokenizer
        )
        self.plan: Plan | None = None
        if spec is not None:
            # Nobody watches a given answer for thinking marks: a term that asks is refused.
            self.plan = compile_plan(
                spec,
                store_of(model),
                model=self._profile.ref,
                hidden_norms=self._profile.hidden_norms,
                limits=Limits(None if any_dose else Limits.max_dose, thinking=False),
                path="--steer",
            )

    @property
    def receipt(self) -> dict[str, Any]:
        """What steers it, under `steering` as on the wire; empty if nothing does."""
        if self.plan is None:
            return {}
        return {"steering": self.plan.receipt}

    def prompt_of(self, question: Question) -> Prompt:
        """Return the prompt's tokens.

        Raises:
            AttributionError: the model cannot read it this way.
        """
        if isinstance(question.prompt, list):
            return prompt_from_messages(self._tokenizer, question.prompt)
        if question.is_raw:
            return prompt_from_text(self._tokenizer, question.prompt)
        if not getattr(self._tokenizer, "chat_template", None):
            raise AttributionError(
                "This model has no chat template; give --raw to have PROMPT read as it stands."
            )
        return prompt_from_messages(self._tokenizer, [{"role": "user", "content": question.prompt}])

    def answers_to(self, prompt: Prompt, question: Question) -> dict[str, tuple[int, ...]]:
        """Return the answers' tokens by name, the model's own likeliest where none is given.

        Raises:
            AttributionError: its own does not fit into the context, or has no word.
        """
        given = {
            name: tuple(self._tokenizer(text, add_special_tokens=False)["input_ids"])
            for name, text in question.answers.items()
        }
        if not question.is_own:
            return given
        own = self._own_answer(prompt, question.max_tokens)
        return {"preferred": own, **given} if given else {"target": own}

    def text_of(self, ids: Sequence[int]) -> str:
        """Return tokens as text."""
        text: str = self._tokenizer.decode(list(ids))
        return text

    def attribute(
        self,
        prompt: Prompt,
        answers: Mapping[str, tuple[int, ...]],
        *,
        is_normalized: bool,
        method: str | None,
        options: Mapping[str, Any],
        baseline: str,
        is_measured: bool,
        progress: Callable[[int, int], None],
    ) -> Attribution:
        """Score the prompt's tokens; see `trimtab.attribution.attribute`."""
        preferred, dispreferred = (*answers.values(), None)[:2]
        assert preferred is not None  # there is an answer
        return attribute(
            Subject(self._loaded, self._profile),
            prompt,
            Objective(preferred, dispreferred, is_normalized=is_normalized),
            method=method,
            options=options,
            baseline=baseline,
            is_measured=is_measured,
            plan=self.plan,
            progress=progress,
        )

    def _own_answer(self, prompt: Prompt, max_tokens: int) -> tuple[int, ...]:
        room = self._profile.max_context - len(prompt.tokens)
        if room < 1:
            raise AttributionError(
                f"The prompt has {len(prompt.tokens)} tokens and the model attends to "
                f"{self._profile.max_context}; shorten it."
            )
        host = SteeredModel(self._loaded, self._profile)
        (found,) = generate(host, [prompt.ids], min(max_tokens, room), plan=self.plan)
        ids = without_end_marks(self._tokenizer, found.ids)
        if not ids:
            raise AttributionError(
                "The model ends its answer before the first word; give one to explain: --target "
                "TEXT."
            )
        return ids
