"""A page of facts about a store, for people."""

from __future__ import annotations

import numpy as np

from rae_fast.latents.layout import is_head, shard_count
from rae_fast.latents.store import LatentStore

UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def store_facts(store: LatentStore) -> dict[str, str]:
    """Facts by name, in the order in which they are worth reading."""
    attrs = store.attrs
    facts = {
        "store": store.url,
        "format": f"{attrs['format']} version {attrs['format_version']}",
        "state": "complete" if store.complete else "incomplete: run tools/build_cache.py again to go on",
        "images": f"{store.n:,}",
    }
    if store.checks is not None:
        facts["images"] = f"{store.n:,} ({int(store.valid.sum()):,} valid, {len(store.failures):,} failures)"
    facts |= {
        "classes": _classes(store),
        "latents": f"{_times(store.latent_shape)}, views {', '.join(store.views)}",
        "pixels": f"{attrs['pixels']} x {attrs['pixels']} uint8" if attrs["pixels"] else "none",
        "codec": f"{attrs['codec']} ({store.codec.dtype}; {store.codec.formula})",
        "codec error": _codec_error(store),
        "shards": f"{shard_count(store.n, store.shard_size):,} of {store.shard_size:,} images",
        "size": _sizes(store),
        "encoder": str(attrs["encoder"]["name"]),
        "encoder weights": str(attrs["encoder"]["weights_sha256"]),
        "encoder layers": f"{attrs['encoder']['layers']}, final norm {attrs['encoder']['final_norm']}",
        "encoder input": f"{attrs['encoder']['input_size']} px, {attrs['encoder']['resize']}",
        "precision": f"{attrs['precision']} on {attrs['device']}, batches of {attrs['encode_batch']}",
        "crop": _crop(store),
        "normalization": _normalization(store),
        "source": f"{attrs['dataset']['source']} ({attrs['dataset']['kind']})",
        "data set digest": str(attrs["dataset_digest"]),
        "made with": ", ".join(f"{name} {version}" for name, version in attrs["versions"].items()),
    }
    return facts


def _times(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _classes(store: LatentStore) -> str:
    counts = np.bincount(store.labels[store.valid] if store.complete else store.labels)
    span = f"{counts.min():,} to {counts.max():,} images each"
    names = ", ".join(store.class_names[:8]) + (", ..." if len(store.class_names) > 8 else "")
    return f"{len(store.class_names) or len(counts):,} ({span}){': ' + names if names else ''}"


def _codec_error(store: LatentStore) -> str:
    error = store.attrs.get("codec_error")
    if error is None:
        return "known when the store is complete"
    snr = "exact" if error["snr_db"] is None else f"{error['snr_db']} dB signal to noise"
    return f"{snr}, relative RMS {error['relative_rms']:.3g}, largest {error['max_error']:.3g}"


def _crop(store: LatentStore) -> str:
    attrs, drift = store.attrs, store.attrs["crop_drift"]
    if drift is None:
        return "unknown"
    against = f"{drift['mean_abs']} levels from the reference's on average, {drift['max_abs']} at most"
    return f"{attrs['crop']}, {attrs['image_size']} px; {against} ({drift['images']} images compared)"


def _normalization(store: LatentStore) -> str:
    source = store.attrs["normalization"]
    if source["source"] == "computed" and not store.complete:
        return "being computed"
    images = source.get("images")
    where = source["source"] + (f" over {images:,} images" if images else "")
    mean, std = store.mean, store.var.sqrt()
    return f"{where}; mean {mean.min():.3f} to {mean.max():.3f}, deviation {std.min():.3f} to {std.max():.3f}"


def _sizes(store: LatentStore) -> str:
    if store.checks is None:
        return "known when the store is complete"
    total = sum(size for size, _ in store.checks.values())
    shards = sum(size for key, (size, _) in store.checks.items() if not is_head(key))
    return f"{readable_bytes(total)} ({shards / store.n:,.0f} bytes an image)"


def readable_bytes(count: float) -> str:
    """`1.5 GiB`."""
    unit = 0
    while count >= 1024 and unit < len(UNITS) - 1:
        count, unit = count / 1024, unit + 1
    return f"{count:,.1f} {UNITS[unit]}" if unit else f"{count:,.0f} B"
