"""The DALI pipeline that turns encoded JPEGs into pixels, and nothing else: fed by us, batch by batch.

DALI's own readers, shards and checkpoints stay out of it: one feeder serves all sources, addressed by position.

Shapes: H, W height and width of one image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

# Each of these differs from DALI's default where it says so, and each default costs fidelity to PIL without a word
# (mean absolute difference in uint8 levels, as measured on photographs).
DECODER_OPTIONS: dict[str, Any] = {
    "adjust_orientation": False,  # default True: EXIF rotates the image; the reference ignores EXIF
    "jpeg_fancy_upsampling": True,  # default False: nvJPEG replicates chroma, 0.3 to 0.5
    "use_fast_idct": False,  # 0.9 if True
}


class DaliDecoder:
    """Decodes one batch at a time in the background: `submit`, then `result`.

    Args:
        batch_size: most images in a batch.
        threads: CPU threads.
        device_id: CUDA device for nvJPEG ("mixed"), or None to decode on the CPU.
        hw_decoder_load: share of a batch for the GPU's JPEG engine.
    """

    def __init__(self, batch_size: int, threads: int, device_id: int | None = None, hw_decoder_load: float = 0.65):
        self._batch_size, self._threads, self._device_id = batch_size, threads, device_id
        self._hw_decoder_load = hw_decoder_load
        self.rebuilds = 0
        self._pipeline = self._build()

    def _build(self) -> Any:
        from nvidia.dali import Pipeline, fn, types

        mixed = self._device_id is not None
        options = dict(DECODER_OPTIONS, output_type=types.RGB, device="mixed" if mixed else "cpu")
        if mixed:
            options["hw_decoder_load"] = self._hw_decoder_load
        # Depth 1: a deeper pipeline asks for several batches before it gives the first, and a bad one costs them all.
        pipeline = Pipeline(self._batch_size, self._threads, self._device_id, prefetch_queue_depth=1)
        with pipeline:
            encoded = fn.external_source(name="encoded", device="cpu", ndim=1, dtype=types.UINT8)
            pipeline.set_outputs(fn.decoders.image(encoded, **options))
        pipeline.build()
        return pipeline

    def submit(self, encoded: Sequence[bytes]) -> None:
        """Start decoding a batch; returns at once."""
        self._pipeline.feed_input("encoded", [np.frombuffer(data, np.uint8) for data in encoded])
        self._pipeline.schedule_run()

    def result(self, cuda_stream: Any = None) -> list[Any]:
        """Images of the batch submitted last, uint8 [H, W, 3]: DALI's own tensors, to be taken over by DLPack.

        Raises:
            RuntimeError: one of them could not be decoded, none is given, and the pipeline has been built anew.
        """
        try:
            (images,) = self._pipeline.outputs(cuda_stream=cuda_stream)
        except RuntimeError:
            self.rebuilds += 1
            self._pipeline = self._build()
            raise
        return [images[i] for i in range(len(images))]
