"""Datasets as TensorFlow Datasets prepares them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter


def write_dataset(folder: Path, features: dict[str, Any], rows: Mapping[str, Sequence[dict[str, Any]]]) -> Path:
    """A dataset of TFDS, as ArrayRecord: split → its rows."""
    folder.mkdir(parents=True)
    schema, name = tfds.features.FeaturesDict(features), folder.parent.name
    serializer = tfds.core.example_serializer.ExampleSerializer(schema.get_serialized_info())
    template = tfds.core.ShardedFileTemplate(
        data_dir=folder, dataset_name=name, split="train", filetype_suffix="array_record"
    )
    infos = []
    for split, entries in rows.items():
        path = folder / f"{name}-{split}.array_record-00000-of-00001"
        writer = ArrayRecordWriter(str(path), "group_size:1")
        for entry in entries:
            writer.write(serializer.serialize_example(schema.encode_example(entry)))
        writer.close()
        infos.append(
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=[len(entries)],
                num_bytes=path.stat().st_size,
                filename_template=template.replace(split=split),
            )
        )
    tfds.folder_dataset.write_metadata(data_dir=str(folder), features=schema, split_infos=infos, check_data=False,
                                       filename_template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}")  # fmt: skip
    return folder
