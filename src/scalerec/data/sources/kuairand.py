"""KuaiRand-Pure (Gao et al., CIKM 2022): short-video impressions of the standard policy with what users did.

Reads the official CSV files, or a part of them put together again as Parquet (2022-04-25 to 05-08, with the users'
histories of the days before). Every feature is known before the impression: what happened in it is label only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as csv
import pyarrow.parquet as pq

from scalerec.data.parts import ROW_GROUP, write_earlier, write_parts
from scalerec.data.running import Earlier, codes, rate
from scalerec.data.source import Source, cache_root, data_root
from scalerec.data.split import Split, TimeSplit
from scalerec.errors import InputError
from scalerec.features import history
from scalerec.schema import (
    Categorical,
    Cross,
    Group,
    MultiCategorical,
    Numeric,
    Schema,
    Sequence,
    SequenceField,
    Task,
)

FINISHED = 0.95  # share of the duration
SKIPPED_MS = 3_000
UTC8_S = 8 * 3600

OFFICIAL = "KuaiRand-Pure/data"
COPY = "kuairand-pure-sub"
LOGS = ("log_standard_4_08_to_4_21_pure.csv", "log_standard_4_22_to_5_08_pure.csv")
OTHER_LABELS = ("is_follow", "is_comment", "is_forward", "is_hate", "is_profile_enter")
TASKS = ("finish", "skip", "long_view", "click", "like")

ONEHOT = tuple(f"onehot_feat{i}" for i in range(18))
STATISTICS = {
    "exposure": "counts show_cnt show_user_num play_cnt play_user_num play_duration",
    "play_depth": "play_progress complete_play_cnt complete_play_user_num valid_play_cnt valid_play_user_num "
    "long_time_play_cnt long_time_play_user_num short_time_play_cnt short_time_play_user_num",
    "likes": "like_cnt like_user_num click_like_cnt double_click_cnt cancel_like_cnt cancel_like_user_num",
    "comments": "comment_stay_duration comment_cnt comment_user_num comment_like_cnt comment_like_user_num",
    "comment_kinds": "direct_comment_cnt direct_comment_user_num reply_comment_cnt reply_comment_user_num "
    "delete_comment_cnt delete_comment_user_num",
    "shares": "share_cnt share_user_num share_all_cnt share_all_user_num outsite_share_all_cnt "
    "download_cnt download_user_num",
    "follows": "follow_cnt follow_user_num cancel_follow_cnt cancel_follow_user_num report_cnt report_user_num",
    "collects": "collect_cnt collect_user_num cancel_collect_cnt cancel_collect_user_num "
    "reduce_similar_cnt reduce_similar_user_num",
}  # means over the whole period: they look ahead
RATES = ("click", "long_view", "finish", "skip", "like")


class KuaiRand(Source):
    """Impressions with five labels; test = the last four days, validation = the day before."""

    version: ClassVar[int] = 2
    kind: Literal["kuairand"] = "kuairand"
    split: Split = TimeSplit(column="date", validation=20220504, test=20220505)
    video_statistics: bool = False  # the data set's 51 whole-period statistics of each video; they leak a little
    running_statistics: bool = True  # counts and rates of what happened in the log before each row

    def schema(self) -> Schema:
        groups = [*_user_groups(self.running_statistics), *_item_groups(self.running_statistics)]
        if self.video_statistics:
            groups += [
                _group(f"video_{name}", "item", "", " ".join(f"video_{column}" for column in columns.split()))
                for name, columns in STATISTICS.items()
            ]
        return Schema(
            groups=tuple(groups),
            tasks=tuple(Task(name=name) for name in TASKS),
            user="user_id",
            item="video_id",
            time="time_ms",
            time_unit=1e-3,
        )

    def build(self, folder: Path, progress: Callable[[str], None]) -> dict[str, Any]:
        found, official = _find()
        progress(f"reading {found}")
        log, users, videos, past = _read_official(found) if official else _read_copy(found)
        statistics = {column for columns in STATISTICS.values() for column in columns.split()}
        videos = videos.rename_columns([f"video_{c}" if c in statistics else c for c in videos.column_names])
        read = log.num_rows
        log = _without_repeats(log)
        log = log.take(pa.array(np.argsort(log["time_ms"].to_numpy(), kind="stable")))
        dropped = read - log.num_rows
        progress(f"{log.num_rows:,} impressions ({dropped:,} exact repeats dropped)")
        rows = _with_context(_with_labels(log), videos)
        if self.running_statistics:
            rows = _with_running_statistics(rows, {user: last for user, (last, _) in past.items()})
        progress("joining features and histories")
        schema = self.schema()
        initial = {user: state for user, (_, state) in past.items()}
        if past:
            write_earlier(folder, _earlier(past, videos, schema))
        pieces = history.replay_pieces(schema, rows, initial, ROW_GROUP)
        write_parts(folder, (_joined(piece, users, videos, schema) for piece in pieces))
        unknown = int(rows["finish"].null_count)
        return {
            "rows": rows.num_rows,
            "rows_read": read,
            "exact_repeats_dropped": dropped,
            "form": "official CSV files" if official else "re-assembled part (2022-04-25 to 2022-05-08)",
            "users_with_history_before_the_log": len(initial),
            "rates": {task: round(float(pc.mean(rows[task]).as_py()), 4) for task in TASKS},
            "date": "the day on which a row was logged: up to an hour after the impression, so at times the next day",
            "finish_unknown": f"{unknown} rows have duration 0: neither a duration nor a finish label",
        }


def _user_groups(running: bool) -> Iterator[Group]:
    yield _group(
        "user_identity",
        "user",
        "user_id user_active_degree is_live_streamer is_video_author register_days_range",
        "register_days",
    )
    yield _group(
        "user_social",
        "user",
        "follow_user_num_range fans_user_num_range friend_user_num_range",
        "follow_user_num fans_user_num friend_user_num",
    )
    yield _group("user_profile", "user", " ".join(ONEHOT[:6]))
    yield _group("user_interest", "user", " ".join(ONEHOT[6:12]))
    yield _group("user_flags", "user", " ".join(ONEHOT[12:]))
    if running:
        yield _group("user_so_far", "user", "", f"user_seconds_since_previous {_so_far('user')}")
    video, author = SequenceField(of="video_id"), SequenceField(of="author_id")
    yield Group(
        name="history",
        side="user",
        features=(
            Sequence(name="watched", fields=(video, author, SequenceField(of="main_tag")), note="every impression"),
            Sequence(name="long_viewed", fields=(video, author), where="long_view"),
            Sequence(name="liked", fields=(video, author), where="like"),
        ),
    )


def _item_groups(running: bool) -> Iterator[Group]:
    yield _group("video", "item", "video_id author_id video_type upload_type music_id", "upload_age_days")
    tags = MultiCategorical(name="tags", column="tag", separator=",", max_len=8)
    content = _group("content", "item", "main_tag music_type", "duration_ms server_width server_height")
    yield content.model_copy(update={"features": (tags, *content.features)})
    if running:
        yield _group("video_so_far", "item", "", _so_far("video"))
        yield _group("author_so_far", "item", "", _so_far("author"))
    crossed = [("user_id", "author_id"), ("user_id", "main_tag")]
    affinity = tuple(Cross(name=f"{a.removesuffix('_id')}_x_{b.removesuffix('_id')}", of=(a, b)) for a, b in crossed)
    numbers = [f"user_{key}_{what}" for key in ("author", "tag") for what in ("impressions", "long_views")]
    affinity += tuple(Numeric(name=name) for name in numbers if running)
    yield Group(name="affinity", side="item", features=affinity)
    context = _group("context", "item", "tab hour weekday")
    pairs = [("user_id", "tab"), ("video_id", "tab"), ("tab", "hour")]
    scenes = tuple(Cross(name=f"{a.removesuffix('_id')}_x_{b}", of=(a, b)) for a, b in pairs)
    yield context.model_copy(update={"features": (*context.features, *scenes)})


def _group(name: str, side: Literal["user", "item"], categorical: str = "", numeric: str = "") -> Group:
    """A group of plain features, their columns given in one text each."""
    ids = [Categorical(name=column) for column in categorical.split()]
    numbers = [Numeric(name=column, log=not column.endswith("_rate")) for column in numeric.split()]
    return Group(name=name, side=side, features=(*ids, *numbers))


def _so_far(key: str) -> str:
    return " ".join([f"{key}_impressions", *(f"{key}_{name}_rate" for name in RATES)])


def _find() -> tuple[Path, bool]:
    """The folder with the data and whether it has the official form."""
    official = [root / OFFICIAL for root in (data_root(), cache_root() / "downloads") if root is not None]
    found = next((folder for folder in official if (folder / LOGS[1]).exists()), None)
    if found is not None:
        return found, True
    root = data_root()
    if root is not None and (root / COPY / "interactions.parquet").exists():
        return root / COPY, False
    raise InputError(
        f"kuairand: found neither {' nor '.join(map(str, official))}: download KuaiRand-Pure.tar.gz from "
        "https://zenodo.org/records/10439422, unpack it there (or set SCALEREC_DATA to where it is)"
    )


Past = dict[int, tuple[int, history.State]]  # by user: the time of the last impression before the log, and the state


def _read_copy(folder: Path) -> tuple[pa.Table, pa.Table, pa.Table, Past]:
    log, users, videos, before = (
        pq.read_table(folder / f"{name}.parquet")
        for name in ("interactions", "user_features", "video_features", "user_histories_before_0425")
    )
    author = dict(zip(videos["video_id"].to_pylist(), videos["author_id"].to_pylist()))
    tag = dict(zip(videos["video_id"].to_pylist(), _main_tag(videos["tag"]).to_pylist()))
    past: Past = {}
    columns = ("user_id", "last_time_ms", "watch_seq", "like_seq", "long_watch_seq")
    for user, last, watched, liked, long_viewed in zip(*(before[column].to_pylist() for column in columns)):
        past[user] = (
            last,
            {
                "watched": tuple((video, author.get(video), tag.get(video)) for video in watched),
                "liked": tuple((video, author.get(video)) for video in liked),
                "long_viewed": tuple((video, author.get(video)) for video in long_viewed),
            },
        )
    return log, users, videos, past


def _read_official(folder: Path) -> tuple[pa.Table, pa.Table, pa.Table, Past]:
    names = (*LOGS, "user_features_pure.csv", "video_features_basic_pure.csv", "video_features_statistic_pure.csv")
    absent = next((name for name in names if not (folder / name).exists()), None)
    if absent is not None:
        raise InputError(f"{folder / absent}: no such file; unpack the whole KuaiRand-Pure archive")
    text = csv.ConvertOptions(column_types={"tag": pa.string(), "upload_dt": pa.string()}, strings_can_be_null=True)
    first, second, users, basic, statistics = (csv.read_csv(folder / name, convert_options=text) for name in names)
    videos = basic.join(statistics, "video_id")
    return pa.concat_tables([first, second], promote_options="permissive"), users, videos, {}


def _earlier(past: Past, videos: pa.Table, schema: Schema) -> pa.Table:
    """The impressions before the log, all at the time of each user's last one; what is not known of them is missing."""
    seen = [(user, last, video) for user, (last, state) in past.items() for video, *_ in state["watched"]]
    kept: dict[str, list[bool]] = {"long_view": [], "like": []}
    for _, state in past.values():
        for name, sequence in (("long_view", "long_viewed"), ("like", "liked")):
            those = {video for video, *_ in state[sequence]}
            kept[name] += [video in those for video, *_ in state["watched"]]
    names = ("user_id", "time_ms", "video_id")
    rows = pa.table({name: pa.array(values, pa.int64()) for name, values in zip(names, zip(*seen))})
    for name, values in kept.items():
        rows = rows.append_column(name, pa.array(values).cast(pa.int8()))
    video = pc.index_in(rows["video_id"], value_set=videos["video_id"].cast(pa.int64()).combine_chunks())
    rows = rows.append_column("main_tag", _main_tag(videos["tag"]).take(video))
    for column in schema.input_columns():
        if column in videos.column_names and column not in rows.column_names:
            rows = rows.append_column(column, _clean(videos[column]).take(video))
    return rows


def _without_repeats(log: pa.Table) -> pa.Table:
    """The log with only the first of rows that agree in every column."""
    numbered = log.append_column("_row", pa.array(np.arange(log.num_rows)))
    first = numbered.group_by(log.column_names, use_threads=False).aggregate([("_row", "min")])["_row_min"]
    return log.take(pa.array(np.sort(first.to_numpy())))


def _with_labels(log: pa.Table) -> pa.Table:
    """Ids, time, context known beforehand and labels; what was measured during the impression stays behind."""
    played, duration = log["play_time_ms"].to_numpy(), log["duration_ms"].to_numpy()
    known = duration > 0
    labels = {
        "finish": pa.array((played >= FINISHED * duration).astype(np.int8), mask=~known),
        "skip": pa.array((played < SKIPPED_MS).astype(np.int8)),
        "long_view": log["long_view"].cast(pa.int8()),
        "click": log["is_click"].cast(pa.int8()),
        "like": log["is_like"].cast(pa.int8()),
    }
    others = {name.removeprefix("is_"): log[name].cast(pa.int8()) for name in OTHER_LABELS}
    whole = {name: log[name].cast(pa.int64()) for name in ("user_id", "video_id", "time_ms", "date", "tab")}
    return pa.table(whole | {"duration_ms": pa.array(duration.astype(np.int64), mask=~known)} | labels | others)


def _with_context(rows: pa.Table, videos: pa.Table) -> pa.Table:
    """Adds hour, weekday and the video's age, by the clock of UTC+8, and the ids that histories keep."""
    seconds = rows["time_ms"].to_numpy() / 1000 + UTC8_S
    days = np.floor(seconds / 86_400).astype(np.int64)
    place = pc.index_in(rows["video_id"], value_set=videos["video_id"].cast(pa.int64()).combine_chunks())
    uploaded = videos["upload_dt"].cast(pa.string()).cast(pa.date32()).cast(pa.int32()).cast(pa.float64())
    age = seconds / 86_400 - uploaded.take(place).to_numpy()
    for name, values in {
        "hour": pa.array((seconds // 3600 % 24).astype(np.int64)),
        "weekday": pa.array((days + 3) % 7),  # 1970-01-01 was a Thursday; 0 is Monday
        "upload_age_days": pa.array(age.astype(np.float32), from_pandas=True),
        "author_id": videos["author_id"].cast(pa.int64()).take(place),
        "main_tag": _main_tag(videos["tag"]).take(place),
    }.items():
        rows = rows.append_column(name, values)
    return rows


def _main_tag(tags: pa.ChunkedArray) -> pa.ChunkedArray:
    """The first of tags written like "39,68"."""
    return pc.list_element(pc.split_pattern(tags.cast(pa.string()), ","), 0)


def _with_running_statistics(rows: pa.Table, last_before: dict[int, int]) -> pa.Table:
    """Adds what had happened before each row to its video, author and user, and between user and author or tag."""
    times = rows["time_ms"].to_numpy()
    happened = {name: rows[name].fill_null(0).to_numpy() for name in RATES}
    known = rows["finish"].is_valid().to_numpy()

    def counted(earlier: Earlier, name: str) -> np.ndarray:
        return earlier.sum(known) if name == "finish" else earlier.count()

    everything = Earlier(np.zeros(len(times), np.int64), times)
    expected = {name: rate(everything.sum(v), counted(everything, name), 0.5) for name, v in happened.items()}
    columns: dict[str, np.ndarray] = {}
    for key, column in (("video", "video_id"), ("author", "author_id"), ("user", "user_id")):
        earlier = Earlier(codes(rows[column]), times)
        columns[f"{key}_impressions"] = earlier.count()
        for name, values in happened.items():
            columns[f"{key}_{name}_rate"] = rate(earlier.sum(values), counted(earlier, name), expected[name])
        if key == "user":
            previous = earlier.time()
            first = np.isnan(previous)
            users = rows["user_id"].to_numpy()[first].tolist()
            previous[first] = [last_before.get(user, np.nan) for user in users]
            columns["user_seconds_since_previous"] = (times - previous) / 1000
    for key, column in (("author", "author_id"), ("tag", "main_tag")):
        earlier = Earlier(codes(rows["user_id"], rows[column]), times)
        columns[f"user_{key}_impressions"] = earlier.count()
        columns[f"user_{key}_long_views"] = earlier.sum(happened["long_view"])
    for name, values in columns.items():
        rows = rows.append_column(name, pa.array(values.astype(np.float32), from_pandas=True))
    return rows


def _joined(rows: pa.Table, users: pa.Table, videos: pa.Table, schema: Schema) -> pa.Table:
    """The rows with every column that the schema reads; the users' and videos' own columns looked up by id."""
    user = pc.index_in(rows["user_id"], value_set=users["user_id"].cast(pa.int64()).combine_chunks())
    video = pc.index_in(rows["video_id"], value_set=videos["video_id"].cast(pa.int64()).combine_chunks())
    for column in schema.input_columns():
        if column in rows.column_names:
            continue
        table, place = (users, user) if column in users.column_names else (videos, video)
        rows = rows.append_column(column, _clean(table[column]).take(place))
    return rows


def _clean(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Text as plain strings, codes written as 3.0 as whole numbers."""
    if pa.types.is_large_string(column.type):
        return column.cast(pa.string())
    if pa.types.is_floating(column.type):
        whole = pc.all(pc.equal(pc.floor(column), column)).as_py()
        return column.cast(pa.int64()) if whole else column.cast(pa.float32())
    return column
