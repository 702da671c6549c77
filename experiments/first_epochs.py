"""A run's first epochs beside those that the authors logged: are its data, weights and schedule theirs?

    python -m experiments.first_epochs LOG_DIR

LOG_DIR belongs to a run of CODAPrompt (--prompt_param 100 8 0) with a ViT-Base teacher, finished or not: the first
epochs of the paper's command take minutes on a GPU. The authors' figures are those of the logs in
github.com/IRVLUTD/CDL: one seed on two GPUs, ImageNet-R with batches of 64 from a later version of their code, all
others from July 2024.
"""

import argparse
import re
from pathlib import Path

from utils.checkpoint import LOG, RunFolder, RunFolderError

# Data set and batch size -> mean loss / training accuracy (%) of the teacher's first epochs on task 1.
EPOCHS = {
    ("ImageNet_R", 64): "1.656/56.155 0.672/82.576 0.524/85.464 0.401/88.542",
    ("ImageNet_R", 32): "1.291/66.2 0.478/86.6 0.372/89.1 0.321/89.7 0.267/92.1",
    ("CIFAR100", 32): "0.588/82.1 0.222/92.7 0.194/93.7",
}
_LINE = re.compile(r"  Task 1/\d+ teacher epoch (\d+)/\d+, .*?: loss (\S+), train accuracy (\S+) %")


def compare(log_dir: Path) -> list[str]:
    """One line per epoch; raises RunFolderError if there is nothing to compare."""
    settings = RunFolder(log_dir).settings()
    run = (settings["dataset"], settings["batch_size"])
    like_theirs = (settings["learner_name"], settings["prompt_param"]) == ("CODAPrompt", [100, 8, 0])
    if run not in EPOCHS or not like_theirs or not settings["t_model"].startswith("vit_base_patch16_224"):
        logged = ", ".join(f"{dataset} with --batch_size {size}" for dataset, size in EPOCHS)
        what = "the authors' logs are of CODAPrompt with --prompt_param 100 8 0, teacher vit_base_patch16_224 and"
        raise RunFolderError(f"{log_dir} has other settings: {what} {logged}")
    text = RunFolder(log_dir).read(LOG).decode()
    epochs = {int(epoch): figures for epoch, *figures in _LINE.findall(text)}  # a repeated epoch counts as run last
    if not epochs:
        raise RunFolderError(f"{log_dir / LOG} holds no epoch of a teacher yet; wait for the first")
    lines = [f"Teacher {settings['t_model']} on {run[0]}, batches of {run[1]}; in brackets the authors' figures"]
    for (epoch, (loss, accuracy)), theirs in zip(sorted(epochs.items()), EPOCHS[run].split(), strict=False):
        their_loss, their_accuracy = theirs.split("/")
        lines.append(f"epoch {epoch}: loss {loss} ({their_loss}), train accuracy {accuracy} % ({their_accuracy})")
    return lines


def main(argv: list[str] | None = None) -> None:
    """Run the command; exit code 2 if there is nothing to compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("log_dir", metavar="LOG_DIR", type=Path)
    try:
        print("\n".join(compare(parser.parse_args(argv).log_dir)))
    except RunFolderError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
