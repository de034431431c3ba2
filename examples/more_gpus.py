"""Stop a run and go on with it on another number of processes: the loss curve is the same to rounding.

Run: python examples/more_gpus.py        Two processes with gloo on the CPU, then one. On GPUs the commands are the same ones.
"""

import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CONFIG = """
batch = 16
images = 1600
lr = 5e-3
prediction = "clean"
evaluation_images = 16

[model]
image_size = 32
latent_factor = 1
in_channels = 3
patch = 8
width = 32
depth = 2
heads = 4
condition = "caption"
vocabulary_size = 1762
learn_sigma = false
mup_base_width = 64

[execution]
device = "cpu"
parallel = "fsdp"               # the weights are sharded; a checkpoint knows how to come back on any number of ranks
checkpoint_seconds = 0.2
"""


def train(folder: Path, ranks: int) -> subprocess.Popen[str]:
    """``ditscale train`` by torchrun; --resume goes on with what is there."""
    command = [
        sys.executable,
        "-P",
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={ranks}",
        "-m",
        "ditscale",
    ]
    command += ["train", str(folder / "config.toml"), "--out", str(folder / "run"), "--resume", "--json"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def main(folder: Path) -> None:
    """Two ranks until there is a checkpoint, then one."""
    (folder / "config.toml").write_text(CONFIG)
    (folder / "run").mkdir()
    first = train(folder, 2)
    while not list((folder / "run").glob("checkpoint-*.json")) and first.poll() is None:
        time.sleep(0.05)
    first.send_signal(signal.SIGTERM)  # as a scheduler would
    first.wait()
    steps = [json.loads(p.read_text())["step"] for p in (folder / "run").glob("checkpoint-*.json")]
    print(f"two processes stopped at step {max(steps, default='the end')}")
    output, _ = train(folder, 1).communicate()
    record = json.loads(output.strip().splitlines()[-1])
    print(f"one process went on to step {record['steps']}: loss {record['loss']:.4f}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        main(Path(scratch))
