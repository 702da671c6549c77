"""NoPrompt: the head alone is trained, on the frozen backbone's features; what any prompt has to beat."""

from models.prompts.base import PromptOutput, PromptPool


class NoPrompt(PromptPool):
    """No prompts and no parameters."""

    needs_query = False

    def forward(self, query: None) -> PromptOutput:
        return PromptOutput(self.no_prompts())
