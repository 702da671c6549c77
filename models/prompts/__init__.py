"""The prompt pools by name: the choices of ``--learner_name`` and the meaning of their ``--prompt_param``.

A new pool is one entry here and one file beside this one. Reading the table imports no torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from utils.config import BELOW_ONE, Config, Param, Type, plain, real, whole
from utils.registry import Entry, Registry


@dataclass(frozen=True)
class PromptEntry(Entry):
    """One line of the PROMPTS table."""

    fields: tuple[Param, ...] = ()  # the values of ``--prompt_param``, in order
    per_task: str = ""  # name of the one that must be at least the number of tasks, if there is one
    options: tuple[str, ...] = ()  # further options of :class:`utils.config.Config` that the pool's constructor takes

    @property
    def paper(self) -> tuple[float, ...]:
        """The values of the paper, used when ``--prompt_param`` is not given."""
        return tuple(field.default for field in self.fields)

    def parse(self, values: Sequence[float], num_tasks: int | None) -> tuple[dict[str, Any], list[str]]:
        """Keywords of the pool's constructor for the allowed values of ``--prompt_param``, a sentence for each other.

        ``num_tasks`` is None while unknown.
        """
        if len(values) != len(self.fields):
            if not self.fields:
                return {}, ["it has none, so leave the flag out"]
            labels = ", ".join(field.help for field in self.fields)
            given = f"{len(values)} given ({' '.join(f'{value:g}' for value in values)})"
            return {}, [f"{len(self.fields)} values are needed ({labels}; paper: {self.paper_text()}), {given}"]
        keywords, problems = {}, []
        for field, value in zip(self.fields, values, strict=True):
            try:
                keywords[field.name] = field.type.read([plain(value)])
            except ValueError as error:
                problems.append(f"{field.help} {error}; paper: {field.default:g}")
        size = keywords.get(self.per_task)
        if size is not None and num_tasks is not None and size < num_tasks:
            must = f"must be at least the number of tasks, {num_tasks}, not {size}"
            problems.append(f"{self.per_task} size {must} (enlarge it, or make other_split_size larger)")
        return keywords, problems

    def build(self, config: Config, dims: Any) -> Any:
        """The pool of a configuration that was checked; ``dims`` are :class:`models.prompts.base.PromptDims`."""
        keywords, _ = self.parse(config.prompt_param, dims.num_tasks)
        options = {name: getattr(config, name) for name in self.options}
        return self.load()(dims=dims, **keywords, **options)

    def paper_text(self) -> str:
        """The paper's values as they are typed on the command line."""
        return " ".join(f"{value:g}" for value in self.paper)


_EVEN = whole(2, step=2)  # of a length one half becomes keys, one half values
_POOL_SIZE = whole(1)._replace(allowed="a whole number of at least the number of tasks")
_DEPTH = Type("-1 (shallow) or 1 (deep)", "N", {-1: False, 0: False, 1: True}.get)

PROMPTS: Registry[PromptEntry] = Registry(
    "learner",
    {
        "CODAPrompt": PromptEntry(
            "models.prompts.coda:CODAPrompt",
            "all components, weighted by similarity; new ones for each task",
            (
                Param("pool", 100, _POOL_SIZE, "pool size"),
                Param("length", 8, _EVEN, "prompt length"),
                Param("ortho_weight", 0.0, real("0 or more", lambda number: number >= 0), "orthogonality weight"),
            ),
            per_task="pool",
        ),
        "DualPrompt": PromptEntry(
            "models.prompts.dualprompt:DualPrompt",
            "general prompts for all images, one expert prompt per task",
            (
                Param("pool", 10, _POOL_SIZE, "pool size"),
                Param("e_length", 20, _EVEN, "expert prompt length"),
                Param("g_length", 6, _EVEN, "general prompt length"),
            ),
            per_task="pool",
        ),
        "L2P": PromptEntry(
            "models.prompts.l2p:L2P",
            "the five prompts of a shared pool whose keys match the query best",
            (
                Param("pool", 30, whole(5), "pool size"),
                Param("length", 20, _EVEN, "prompt length"),
                Param("deep", -1, _DEPTH, "depth"),
            ),
        ),
        "APT": PromptEntry(
            "models.prompts.apt:APT",
            "two vectors per block, added to the class token's key and value; merged over the tasks",
            (Param("dropout", 0.01, BELOW_ONE, "dropout (without effect)"),),
            options=("ema_coeff",),
        ),
        "OnePrompt": PromptEntry(
            "models.prompts.one_prompt:OnePrompt",
            "the same prompts for all images and tasks",
            (Param("length", 8, _EVEN, "prompt length"),),
        ),
        "NoPrompt": PromptEntry("models.prompts.one_prompt:NoPrompt", "no prompts, the head alone"),
    },
)
