"""What happens inside while an image is generated, to see and to change."""

from stable_diffusion.explain.daam import HeatMaps, heat_maps
from stable_diffusion.explain.probe import Place, attention_probe
from stable_diffusion.explain.trace import Trace, trace
