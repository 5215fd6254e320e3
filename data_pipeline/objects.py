"""Images at their own sizes with their objects: what detectors read.

    shards -> survey: which samples serve, and what is left out, counted
           -> object_loader: lists of `ObjectSample`, endless and shuffled or once and in order

What shards of other makers may hold is made good where it is read: boxes are cut to the image, and objects without
area, of a class that is not among the names, or with a mask of another size are left out. The survey does the same
before any work starts, so that nothing is first met in the middle of a run.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data_pipeline.errors import DataError
from data_pipeline.decoding import decode_image
from data_pipeline.order import ElasticSampler, SampleOrder
from data_pipeline.parallel import ordered_map
from data_pipeline.shards import IMAGE_EXTENSIONS, Manifest, Shard, ShardReader, Split
from data_pipeline.sources.annotations import OutlineError, clean_boxes, decode_mask

MIN_SIDE = 16  # pixels; no stream is made of a smaller image
IN_ONE_PROCESS = 2000  # samples that are surveyed faster than processes start


class Objects(NamedTuple):
    """The K objects of an image.

    `ignored` are crowds and what VOC calls difficult: nothing is learned of them, and nothing is lost by finding them.
    """

    boxes: Tensor  # (K, 4) float32, x0 y0 x1 y1 in pixels, inside the image, with area
    labels: Tensor  # (K,) int64
    crowds: Tensor  # (K,) bool
    difficult: Tensor  # (K,) bool
    areas: Tensor  # (K,) float32, square pixels: as the source says, else of the mask or of the box
    masks: Tensor | None  # (K, H, W) uint8, zeros and ones; None where they were not asked for

    @property
    def ignored(self) -> Tensor:
        """(K,) bool."""
        return self.crowds | self.difficult


class ObjectSample(NamedTuple):
    """One image with its objects."""

    image: Tensor  # (3, H, W) uint8 RGB, upright
    objects: Objects
    index: int  # type: ignore[assignment]  # of the data set; hides tuple.index
    key: str


class Survey(NamedTuple):
    """What a split holds for a detector."""

    usable: np.ndarray  # int64 dataset indexes of the samples that serve, ascending
    shard_sizes: list[int]  # how many of them lie in each shard
    num_objects: int
    left_out: dict[str, int]  # reason -> count


class UnusableError(DataError):
    """A sample that says nothing a detector could use; its message is the reason."""


def read_objects(
    facts: dict[str, Any], width: int, height: int, num_classes: int, masks: bool
) -> tuple[Objects, Counter[str]]:
    """The objects that `facts`, a sample's JSON, tells of an image of width x height pixels, and what was left out.

    Args:
        masks: instance masks are wanted.

    Raises:
        UnusableError: the image is too small; it was never looked at for objects; masks are wanted and it has none.
        DataError: a field that is no list of what it should hold.
    """
    if min(width, height) < MIN_SIDE:
        raise UnusableError(f"image smaller than {MIN_SIDE} pixels")
    if facts.get("boxes") is None:
        raise UnusableError("image without boxes")
    count = len(facts["boxes"])
    if len(facts.get("labels") or []) != count:
        raise UnusableError("image with more or fewer labels than boxes")
    if masks and count and len(facts.get("masks") or []) != count:
        raise UnusableError("image without a mask for each box")
    try:
        return _objects(facts, width, height, num_classes, masks)
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(f"boxes or labels are not numbers as they should be ({error}); build it again") from error


def _objects(
    facts: dict[str, Any], width: int, height: int, num_classes: int, masks: bool
) -> tuple[Objects, Counter[str]]:
    cleaned = clean_boxes(facts["boxes"], width, height)
    left_out: Counter[str] = Counter()
    left_out["box without area in the image"] += len(cleaned.dropped)
    left_out["box cut to the image"] += cleaned.num_clipped
    boxes_kept: list[list[float]] = []
    labels: list[int] = []
    numbers: list[int] = []  # of the objects kept, among those given
    outlines: list[np.ndarray] = []
    for box, number in zip(cleaned.boxes, cleaned.kept, strict=True):
        label = int(facts["labels"][number])
        if not 0 <= label < num_classes:
            left_out["object of unknown class"] += 1
            continue
        if masks:
            try:
                mask = decode_mask(facts["masks"][number], width, height)
            except OutlineError:
                left_out["object whose mask is damaged or of another size"] += 1
                continue
            if not mask.any():
                left_out["object whose mask is empty"] += 1
                continue
            outlines.append(mask)
        boxes_kept.append(box)
        labels.append(label)
        numbers.append(number)
    if not numbers:
        left_out["image without objects, kept as background"] += 1
    boxes = torch.tensor(boxes_kept, dtype=torch.float32).reshape(-1, 4)
    stacked = None
    if masks:
        stacked = torch.zeros((len(outlines), height, width), dtype=torch.uint8)
        for place, mask in zip(stacked, outlines, strict=True):
            place.copy_(torch.from_numpy(mask))
    measured = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    if stacked is not None:
        measured = stacked.sum(dim=(1, 2)).float()
    if facts.get("areas") is not None:
        measured = torch.tensor([facts["areas"][number] for number in numbers], dtype=torch.float32)
    objects = Objects(
        boxes,
        torch.tensor(labels, dtype=torch.int64),
        _flags(facts.get("iscrowd"), numbers),
        _flags(facts.get("difficult"), numbers),
        measured,
        stacked,
    )
    return objects, +left_out


def _flags(values: list[Any] | None, numbers: list[int]) -> Tensor:
    return torch.tensor([bool(values[number]) if values else False for number in numbers], dtype=torch.bool)


def survey(root: str | Path, split: str, num_classes: int, masks: bool) -> Survey:
    """Look at every sample's annotations, not at its pixels.

    Raises:
        DataError: no such split, a damaged shard, or a sample that cannot be read.
    """
    chosen = Manifest.load(root).split(split)
    jobs = [(Path(root), shard, num_classes, masks) for shard in chosen.shards]
    parts = map(_survey_shard, jobs)
    if chosen.num_samples > IN_ONE_PROCESS:
        parts = ordered_map(_survey_shard, jobs, chunk=1)  # type: ignore[assignment]
    usable, sizes, num_objects, left_out, start = [], [], 0, Counter[str](), 0
    for shard, (found, objects, reasons) in zip(chosen.shards, parts, strict=True):
        usable += [start + index for index in found]
        sizes.append(len(found))
        start += shard.samples
        num_objects += objects
        left_out += reasons
    return Survey(np.array(usable, dtype=np.int64), sizes, num_objects, dict(left_out))


def _survey_shard(job: tuple[Path, Shard, int, bool]) -> tuple[list[int], int, Counter[str]]:
    root, shard, num_classes, masks = job
    reader = ShardReader(root, Split((shard,)))
    found, num_objects, left_out = [], 0, Counter[str]()
    for index in range(shard.samples):
        sample = reader.read(index)
        try:
            facts = _facts(sample)
            # Only shards of other makers lack the size: then the picture has to tell.
            width, height = facts.get("width"), facts.get("height")
            if not (isinstance(width, int) and isinstance(height, int)):
                height, width = decode_image(_picture(sample)).shape[:2]
            objects, reasons = read_objects(facts, width, height, num_classes, masks)
        except UnusableError as error:
            left_out[str(error)] += 1
        except DataError as error:
            raise DataError(f"{root / shard.name}: sample {sample['__key__']}: {error}") from error
        else:
            found.append(index)
            num_objects += int((~objects.ignored).sum())
            left_out += reasons
    return found, num_objects, left_out


def _facts(sample: dict[str, Any]) -> dict[str, Any]:
    try:
        facts = json.loads(sample.get("json", b"{}"))
    except ValueError as error:
        raise DataError(f"its JSON is damaged ({error}); build the data set again") from error
    if not isinstance(facts, dict):
        raise DataError("its JSON is no object; build the data set again")
    return facts


def _picture(sample: dict[str, Any]) -> bytes:
    data = next((sample[extension] for extension in IMAGE_EXTENSIONS if extension in sample), None)
    if data is None:
        raise DataError("has no image; build the data set again")
    return data


class ObjectDataset(Dataset[ObjectSample]):
    """Map-style data set of the usable samples of a split.

    Args:
        max_side: pixels; larger images come shrunk, with their objects, as if the data set held them so.
    """

    def __init__(
        self, root: str | Path, split: str, found: Survey, num_classes: int, masks: bool, max_side: int | None = None
    ):
        self.reader = ShardReader(root, Manifest.load(root).split(split))
        self.found, self.num_classes, self.masks, self.max_side = found, num_classes, masks, max_side

    def __len__(self) -> int:
        return len(self.found.usable)

    def __getitem__(self, number: int) -> ObjectSample:
        index = int(self.found.usable[number])
        sample = self.reader.read(index)
        try:
            pixels = decode_image(_picture(sample))
            height, width = pixels.shape[:2]
            facts = _facts(sample)
            if (facts.get("width", width), facts.get("height", height)) != (width, height):
                raise DataError(
                    f"is {width} x {height}, not {facts.get('width')} x {facts.get('height')} as noted; build it again"
                )
            objects, _ = read_objects(facts, width, height, self.num_classes, self.masks)
        except DataError as error:
            raise DataError(f"{self.reader.root}: sample {sample['__key__']}: {error}") from error
        image = torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
        return shrink(ObjectSample(image, objects, index, sample["__key__"]), self.max_side)

    def __getitems__(self, numbers: list[int]) -> list[ObjectSample] | DataError:
        """A batch for DataLoader; an error travels as a value to `ObjectLoader`, which raises it."""
        try:
            return [self[number] for number in numbers]
        except DataError as error:
            return error


def shrink_image(image: Tensor, max_side: int | None) -> Tensor:
    """The image (3, H, W) uint8 with its longer side at most `max_side` pixels, antialiased."""
    height, width = image.shape[-2:]
    if max_side is None or max(height, width) <= max_side:
        return image
    scale = max_side / max(height, width)
    size = [max(MIN_SIDE, round(side * scale)) for side in (height, width)]
    return F.interpolate(image[None], size=size, mode="bilinear", antialias=True)[0]


def shrink(sample: ObjectSample, max_side: int | None) -> ObjectSample:
    """The sample with its longer side at most `max_side` pixels."""
    image = shrink_image(sample.image, max_side)
    if image is sample.image:
        return sample
    (height, width), (before_height, before_width) = image.shape[-2:], sample.image.shape[-2:]
    x, y = width / before_width, height / before_height
    objects, masks = sample.objects, sample.objects.masks
    if masks is not None:
        smaller = masks.new_zeros((len(masks), height, width))
        masks = F.interpolate(masks[None], size=(height, width), mode="nearest")[0] if len(masks) else smaller
    boxes = objects.boxes * torch.tensor([x, y, x, y])
    return sample._replace(image=image, objects=objects._replace(boxes=boxes, areas=objects.areas * x * y, masks=masks))


class ObjectLoader(DataLoader[list[ObjectSample]]):
    """Batches as lists, because images differ in size; a worker's DataError is raised as it was, in one line."""

    def __iter__(self) -> Iterator[list[ObjectSample]]:  # type: ignore[override]
        for batch in super().__iter__():
            if isinstance(batch, DataError):
                break
            yield batch
        else:
            return
        # Let go of the workers first: the error's traceback would keep them until it is collected.
        self._iterator = None
        raise batch


def object_loader(
    dataset: ObjectDataset,
    *,
    batch_size: int,
    rank: int = 0,
    world: int = 1,
    num_workers: int = 0,
    seed: int = 0,
    samples_seen: int = 0,
) -> ObjectLoader:
    """This rank's training batches without end, from position `samples_seen` of the order; `batch_size` is global."""
    order = SampleOrder(dataset.found.shard_sizes, seed)
    return _loader(dataset, ElasticSampler(order, batch_size, rank, world, samples_seen), num_workers)


def once(dataset: ObjectDataset, *, rank: int = 0, world: int = 1, num_workers: int = 0) -> ObjectLoader:
    """Each usable sample once, in order, one a batch; rank r takes every world-th."""
    return _loader(dataset, [[number] for number in range(rank, len(dataset), world)], num_workers)


def _loader(dataset: ObjectDataset, batches: Iterable[list[int]], num_workers: int) -> ObjectLoader:
    return ObjectLoader(
        dataset,  # type: ignore[arg-type]  # `_as_it_is` makes the batches of its samples
        batch_sampler=batches,
        collate_fn=_as_it_is,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
    )


def _as_it_is(samples: list[ObjectSample]) -> list[ObjectSample]:
    return samples
