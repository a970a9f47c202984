"""A drop-in cache for Gemma 3 in `transformers`: three lines, docs/transformers.md.

    codec = calibrate_cache(model, tokenizer)                                # or Codec.load(path)
    out = model.generate(**inputs, past_key_values=TPACache(codec, model))

The files:

    theirs.py     what of their model is looked at, by hooks        codec.py      how K and V are cached; files
    calibrate.py  moments, by their own forward and backward pass   cache.py      a `Cache` of theirs with our codes
    places.py     where new tokens stand, on which device           attention.py  attention on the codes
"""

from tpa_ref.errors import TPAError

try:
    import transformers
except ModuleNotFoundError:
    raise TPAError("tpa_torch.hf: transformers is not installed: pip install -e .[hf]") from None
if tuple(map(int, transformers.__version__.split(".")[:2])) < (4, 57):
    raise TPAError(f"tpa_torch.hf: transformers must be >= 4.57, got {transformers.__version__}")

from .cache import TPACache
from .calibrate import calibrate_cache
from .codec import Codec

__all__ = ["Codec", "TPACache", "calibrate_cache"]
