"""The same job on more than one machine: Ray Data reads, shares out and writes, its workers ask.

    dataset = ray.data.read_parquet("s3://bucket/pictures")
    dataset.map_batches(Labeller, fn_constructor_args=("<OD>",), concurrency=4).write_parquet("s3://bucket/labels")

`label_on_ray` is the whole job of `florence2 label --ray`, which goes on where it was ended.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import ray
from florence2_client import Florence2Client
from pyarrow import parquet
from pyarrow.fs import FileSelector, FileSystem, FileType
from ray.data import ActorPoolStrategy, DataContext, Datasource, ReadTask
from ray.data.block import BlockAccessor, BlockMetadata
from ray.data.checkpoint import CheckpointConfig
from ray.data.datasource import BlockBasedFileDatasink
from ray.exceptions import RayError

from florence2_apps.label.job import Job, same_job, to_line
from florence2_apps.label.labelling import RETRIES, Labelled, check_server, rows
from florence2_apps.label.sources import Picture, Source, picture

if TYPE_CHECKING:
    import numpy as np

_LINES = 64
"""Of a block: what is asked again after a kill, and lies in one file of the output."""
_OVERLAPPING = 2
"""Blocks at once in a worker, so that one starts while the last answers of another are awaited."""
_REFUSED = re.compile(r"^\S*ServerRefused: (.*)$", re.MULTILINE)
_PICTURE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


class Labeller:
    """For `Dataset.map_batches`: asks about the pictures of one column and adds a line's keys as columns.

    The column holds encoded files, paths, URLs, arrays u8 [H, W, 3], or `{"bytes", "path"}`. The columns are those of
    `florence2 label`'s lines but `image`: prompt, the settings given, width, height, answer, text, sequence_score,
    finish_reason, model_version, and error, which says why a picture has no answer.

    `url` is as the workers see it: localhost is each machine's own server. `in_flight`: requests of a batch at once.
    Raises ServerRefused where the server fails, ValueError for columns that are there already.
    """

    def __init__(
        self,
        prompt: str,
        *,
        column: str = "image",
        url: str = "localhost:8001",
        model: str = "florence2",
        in_flight: int = 32,
        **settings: Any,
    ) -> None:
        self.job, self.column, self.in_flight = Job(prompt, settings), column, in_flight
        self._client = Florence2Client(url, model=model, retries=RETRIES)
        self._schema = pa.schema([one for one in self.job.schema() if one.name != "image"])
        self._checked = False

    def __call__(self, batch: "dict[str, np.ndarray] | pa.Table") -> pa.Table:
        if not self._checked:
            check_server(self._client, self.job)
            self._checked = True
        table = batch if isinstance(batch, pa.Table) else BlockAccessor.batch_to_block(batch)
        if taken := set(table.column_names) & set(self._schema.names):
            raise ValueError(f"the data set has a column {', '.join(sorted(taken))} already; rename or drop it")
        values = batch[self.column].to_pylist() if batch is table else batch[self.column]
        pictures = (Picture("", picture(value)[1], "") for value in values)
        lines = rows(pictures, self.job, self._client, self.in_flight)
        found = pa.Table.from_pylist(list(lines), self._schema)
        for name in self._schema.names:
            table = table.append_column(self._schema.field(name), found[name])
        return table


def label_on_ray(
    source: Source,
    job: Job,
    output: str,
    *,
    url: str,
    model: str,
    in_flight: int,
    workers: int,
) -> Labelled:
    """Like `label`, with `workers` processes of the running Ray, each with `in_flight` requests at once.

    `output`, here or where pyarrow.fs writes (`s3://…`), is a folder of .jsonl or .parquet files, as its suffix says;
    their lines are in no order. Beside it OUTPUT.done tells Ray's next run what is done. -> what this run has added.

    Raises ValueError for an output that is another job's, RuntimeError where Ray or the server fails.
    """
    lines = _Lines(output, job)
    _claim(output, job)
    context = DataContext.get_current().copy()
    context.checkpoint_config = CheckpointConfig("key", f"{_uri(output)}.done/keys", delete_checkpoint_on_success=False)
    share = max(1, in_flight // _OVERLAPPING)
    asker = {"column": "picture", "url": url, "model": model, "in_flight": share, **job.settings}
    with DataContext.current(context):
        pictures = ray.data.read_datasource(
            _Pictures(source), override_num_blocks=max(2 * workers, -(-len(source) // _LINES))
        )
        labelled = pictures.map_batches(
            _Asker,
            fn_constructor_args=(job.prompt,),
            fn_constructor_kwargs=asker,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(
                size=workers, max_concurrent_calls_per_actor=_OVERLAPPING, enable_true_multi_threading=True
            ),
            num_cpus=0,  # they wait
        )
        try:
            labelled.write_datasink(lines)
        except RayError as error:
            raise RuntimeError(f"{_reason(error)}; what is done is kept, and the same command goes on") from error
    return lines.labelled


class _Asker(Labeller):
    """Sends the pictures no further."""

    def __call__(self, batch: Any) -> pa.Table:
        return super().__call__(batch).drop_columns(self.column)


class _Pictures(Datasource):
    """A source's pictures: image (the name), key, and picture."""

    def __init__(self, source: Source) -> None:
        super().__init__()
        self.source = source

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ReadTask]:
        return [
            ReadTask(partial(_tables, part), BlockMetadata(num_rows=len(part), size_bytes=None, exec_stats=None))
            for part in self.source.parts(parallelism)
        ]


class _Lines(BlockBasedFileDatasink):
    """A folder of files of lines; `labelled` counts them."""

    def __init__(self, output: str, job: Job) -> None:
        super().__init__(output, file_format=_format(output))
        self.schema = job.schema()
        self.labelled = Labelled(0, 0)

    def write_block_to_file(self, block: BlockAccessor, file: Any) -> None:
        table = block.to_arrow().select(self.schema.names)
        if self.file_format == "parquet":
            parquet.write_table(table, file)
        else:
            file.writelines(map(to_line, table.to_pylist()))

    def write(self, blocks: Iterable[Any], ctx: Any) -> Any:
        """-> how many lines have an error."""
        blocks = list(blocks)
        super().write(blocks, ctx)
        tables = (BlockAccessor.for_block(block).to_arrow() for block in blocks)
        return sum(len(table) - table["error"].null_count for table in tables if len(table))

    def on_write_complete(self, write_result: Any) -> None:
        super().on_write_complete(write_result)
        self.labelled = Labelled(write_result.num_rows, sum(write_result.write_returns))


def _tables(part: Source) -> Iterator[pa.Table]:
    pictures = iter(part)
    while some := list(islice(pictures, _LINES)):
        columns: dict[str, Any] = {
            "image": pa.array([one.name for one in some], pa.string()),
            "key": pa.array([one.key for one in some], pa.string()),
            "picture": pa.array([_struct(one.image) for one in some], _PICTURE),
        }
        yield pa.table(columns)


def _struct(image: str | bytes) -> dict[str, Any]:
    return {"path": image} if isinstance(image, str) else {"bytes": image}


def _claim(output: str, job: Job) -> None:
    """Refuse a folder that is another job's; otherwise note that it is this one's."""
    files, folder = FileSystem.from_uri(_uri(output))
    note = f"{folder}.done/job.json"
    if files.get_file_info(note).type is FileType.File:
        with files.open_input_stream(note) as file:
            same_job(json.loads(file.read()), job, output)
        return
    if files.get_file_info(FileSelector(folder, allow_not_found=True)):
        raise ValueError(f"{output} holds files that `florence2 label` has no note of; name a new folder")
    files.create_dir(f"{folder}.done", recursive=True)
    with files.open_output_stream(note) as file:
        file.write(json.dumps(job.asked).encode())


def _reason(error: RayError) -> str:
    """What happened in a worker, out of Ray's account of it."""
    account = str(error)
    found = _REFUSED.search(account)
    return found.group(1) if found else account.partition("\n\nThe above exception")[0].strip().splitlines()[-1]


def _format(output: str) -> str:
    suffix = os.path.splitext(output)[1].removeprefix(".")
    if suffix not in ("jsonl", "parquet"):
        raise ValueError(f"{output} says no format that Ray writes; name a folder FOLDER.jsonl or FOLDER.parquet")
    return suffix


def _uri(output: str) -> str:
    return output if "://" in output else os.path.abspath(output)
