"""The prompt pools by name: the choices of ``--learner_name`` and the meaning of their ``--prompt_param``.

A new pool is one entry here and one file beside this one. Reading the table imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from models.prompts.fields import Count, Field, Number, OneOf
from utils.config import BELOW_ONE, Config, real
from utils.registry import Entry, Registry


@dataclass(frozen=True)
class PromptEntry(Entry):
    """One line of the PROMPTS table.

    Attributes:
        fields: the values of ``--prompt_param``, in order.
        paper: the values of the paper, used when ``--prompt_param`` is not given.
        options: further options of :class:`utils.config.Config` that the pool's constructor takes.
    """

    fields: tuple[Field, ...] = ()
    paper: tuple[float, ...] = ()
    options: tuple[str, ...] = ()

    def parse(self, values: Sequence[float], num_tasks: int | None) -> tuple[dict[str, Any], list[str]]:
        """Turn the values of ``--prompt_param`` into keywords of the pool's constructor.

        Returns:
            The keywords of the allowed values, and one sentence for each other value.
        """
        if len(values) != len(self.fields):
            if not self.fields:
                return {}, ["it has none, so leave the flag out"]
            labels = ", ".join(field.label for field in self.fields)
            given = f"{len(values)} given ({' '.join(f'{value:g}' for value in values)})"
            return {}, [f"{len(self.fields)} values are needed ({labels}; paper: {self.paper_text()}), {given}"]
        keywords, problems = {}, []
        for field, value in zip(self.fields, values, strict=True):
            try:
                keywords[field.name] = field.parse(value, num_tasks)
            except ValueError as error:
                problems.append(str(error))
        return keywords, problems

    def build(self, config: Config, dims: Any) -> Any:
        """The pool of a configuration that was checked; ``dims`` are :class:`models.prompts.base.PromptDims`."""
        keywords, _ = self.parse(config.prompt_param, dims.num_tasks)
        options = {name: getattr(config, name) for name in self.options}
        return self.load()(dims=dims, **keywords, **options)

    def paper_text(self) -> str:
        """The paper's values as they are typed on the command line."""
        return " ".join(f"{value:g}" for value in self.paper)


_POOL = Count("pool", "pool size", per_task=True)
# Lengths are even: one half becomes keys, one half values.
_LENGTH = Count("length", "prompt length", 2, even=True)
_E_LENGTH = Count("e_length", "expert prompt length", 2, even=True)
_G_LENGTH = Count("g_length", "general prompt length", 2, even=True)
_ORTHO = Number("ortho_weight", "orthogonality weight", real("0 or more", lambda number: number >= 0))
_DEPTH = OneOf("deep", "depth", {-1: False, 0: False, 1: True}, "-1 (shallow) or 1 (deep)")

PROMPTS: Registry[PromptEntry] = Registry(
    "learner",
    {
        "CODAPrompt": PromptEntry(
            "models.prompts.coda:CODAPrompt",
            "all components, weighted by similarity; new ones for each task",
            (_POOL, _LENGTH, _ORTHO),
            (100, 8, 0.0),
        ),
        "DualPrompt": PromptEntry(
            "models.prompts.dualprompt:DualPrompt",
            "general prompts for all images, one expert prompt per task",
            (_POOL, _E_LENGTH, _G_LENGTH),
            (10, 20, 6),
        ),
        "L2P": PromptEntry(
            "models.prompts.l2p:L2P",
            "the five prompts of a shared pool whose keys match the query best",
            (Count("pool", "pool size", 5), _LENGTH, _DEPTH),
            (30, 20, -1),
        ),
        "APT": PromptEntry(
            "models.prompts.apt:APT",
            "two vectors per block, added to the class token's key and value; merged over the tasks",
            (Number("dropout", "dropout (without effect)", BELOW_ONE),),
            (0.01,),
            ("ema_coeff",),
        ),
        "OnePrompt": PromptEntry(
            "models.prompts.one_prompt:OnePrompt", "the same prompts for all images and tasks", (_LENGTH,), (8,)
        ),
        "NoPrompt": PromptEntry("models.prompts.no_prompt:NoPrompt", "no prompts, the head alone"),
    },
)
