"""Bugs that tests/sim/planted.py plants: what is patched in the headers, and what must notice it.

Each one is a mistake that was made in such a protocol before: a missing fence, wait, release, acquire or
synchronisation, a place off by one, a counter that is not reset.
"""

from __future__ import annotations

from dataclasses import dataclass

from tests.elastic import combines

MAX_SEEDS = 40
TWO_SENDERS = 5  # SMs: with the simulated roles, two of them send
MANY_TOKENS = 24  # a warp announces a batch while later pieces are under way


@dataclass(frozen=True)
class Bug:
    """A text of one header, and what stands there instead.

    Attributes:
        noticed_by: a text that the error must hold; which tool is to see it is part of what we know about a bug.
        times: how often the old text stands there.
        num_tokens: that a rank sends at least; what shows late needs many.
        num_sms: of every call, at most.
        combining: the layout in which it shows; in place, dispatches are so too.
        do_cpu_sync: of all dispatches; the room that they make is drawn (tests/elastic/rooms.py).
        stories: which are told: round trips, and all that is said above goes for these; barriers, or mishaps.
        num_seeds: within which it must be noticed.
        race_detector: whether it takes one; without, a seed takes a fifth of the time.
        beside: file, old and new texts of what is no bug by itself and makes this one show.
    """

    name: str
    file: str
    old: str
    new: str
    noticed_by: str
    times: int = 1
    num_tokens: int = 3
    num_sms: int = 3
    combining: combines.Options = combines.PLAIN
    do_cpu_sync: bool = False
    stories: str = "trips"
    num_seeds: int = MAX_SEEDS
    race_detector: bool = True
    beside: tuple[tuple[str, str, str], ...] = ()


SUMS = combines.Options(expanded=True, multiple_reduction=True)
EVERY_ROW = combines.Options(expanded=True, multiple_reduction=False)
IN_PLACE = combines.Options(zero_copy=True)
RACE, DEADLOCK = "data race", "deadlock"
FENCE_SHARED = "    device::fence_async_proxy_shared();\n"
FENCE_GLOBAL = "    device::fence_async_proxy_global();\n"
SYNC_WARP = "    device::sync_warp();\n"
# The words of a label in memory after the one that says that the token comes: nothing orders them, but the simulator's
# stores are seen in the order of the program.
LABEL_STEP = "  label_tokens(router, epoch, abreast, first, routed, selection.rank, position);\n}"
LATE_LABELS = (
    (
        "phases/route.cuh",
        LABEL_STEP,
        "  if (selection.speaks) {\n"
        "    uint64_t* said = deep_ep::routed(router.window, selection.rank, router.window.rank, first + abreast.j);\n"
        "    device::store_relaxed_sys(said, word(static_cast<uint32_t>(routed.slot), epoch));\n"
        "  }\n"
        f"  for (int i = 0; i < 50; ++i) device::sync_warp();\n{LABEL_STEP}",
    ),
)

BUGS = (
    # The copy engine does not see what threads did to a stage: one for each place where it must.
    Bug("scatter-without-fence", "phases/scatter.cuh", "  device::fence_async_proxy_shared();\n", "", RACE),
    Bug("push-without-fence", "phases/push_rows.cuh", "if (row_ends || kReturn == Return::kSum)", "if (false)", RACE),
    # Nor what was acquired from a peer.
    Bug("arrivals-without-fence", "phases/arrivals.cuh", FENCE_GLOBAL, "", RACE),
    Bug("admit-without-fence", "phases/admit.cuh", "  device::fence_async_proxy_global();", "", RACE),
    # Announcements.
    Bug(
        "announce-before-stores-are-complete",
        "phases/announce.cuh",
        "    if (device::elect()) {\n      if (is_due)",
        "    if (false) {\n      if (is_due)",
        RACE,
        num_tokens=MANY_TOKENS,
    ),
    Bug("announce-relaxed", "phases/announce.cuh", "store_release_sys", "store_relaxed_sys", RACE),
    Bug("arrivals-relaxed", "phases/arrivals.cuh", "load_acquire_sys(mark())", "load_relaxed_sys(mark())", RACE),
    Bug("parts-relaxed", "phases/reduce.cuh", "load_acquire_sys", "load_relaxed_sys", RACE),
    Bug(
        "announce-the-next-slot",
        "phases/announce.cuh",
        "window.rank, slot_of_lane), epoch",
        "window.rank, slot_of_lane + 1), epoch",
        DEADLOCK,
    ),
    # Labels, of which nobody says that they have come.
    Bug("label-of-any-epoch", "phases/land.cuh", "static_cast<uint32_t>(seen >> 32) == landing.epoch ||", "true ||", "",
        race_detector=False),
    Bug("weight-not-awaited", "phases/land.cuh",
        "resolve(landing, label_word(landing, seen.source, seen.token, k, 1), seen.weight, seen.source, weight)",
        "(weight = static_cast<uint32_t>(seen.weight), true)", "recv_topk_weights differs", race_detector=False),
    Bug("place-not-awaited", "phases/copy_out.cuh",
        "!resolve(landing_, place_word(), place_, token_.source, packed)",
        "(packed = static_cast<uint32_t>(place_), false)", "", combining=SUMS, race_detector=False, beside=LATE_LABELS),
    Bug("places-over-the-scale-factors", "phases/copy_out.cuh", "stage.data + piece_bytes + landing_.record.tail_bytes",
        "stage.data + piece_bytes", "", combining=SUMS),
    Bug("land-the-next-row", "phases/land.cuh", "row_base[seen.source] + static_cast<int>(slot)",
        "row_base[seen.source] + static_cast<int>(slot) + 1", "", race_detector=False),
    # The last tokens of a combine, which are shared out.
    Bug("part-of-the-next-token", "phases/reduce.cuh", "(job - whole) % parts * part_bytes", "0",
        "combined_x differs", race_detector=False,
        beside=(("phases/reduce.cuh", "record.row_bytes, kAtOnce.vectors * kStride)", "record.row_bytes, 16)"),)),
    # Rows that lie in place: what was written before the call is there, and stays until all have read it.
    Bug("offer-relaxed", "phases/in_place.cuh", "store_release_sys", "store_relaxed_sys", RACE, times=2,
        combining=IN_PLACE),
    Bug("find-rows-relaxed", "phases/in_place.cuh", "load_acquire_sys", "load_relaxed_sys", RACE, combining=IN_PLACE),
    Bug("find-rows-without-fence", "phases/in_place.cuh", "device::fence_async_proxy_global();  // the copy engine",
        "//", RACE, combining=IN_PLACE),
    Bug("readers-not-awaited", "phases/retire.cuh", "    await_readers(window, epoch, patience);\n",
        "", RACE, combining=IN_PLACE),
    Bug("readers-not-acquired", "phases/retire.cuh", "load_acquire_sys", "load_relaxed_sys", RACE, combining=IN_PLACE),
    Bug("readers-awaited-before-own-marks", "phases/retire.cuh", "  const int lane = device::lane_idx();\n",
        "  const int lane = device::lane_idx();\n  if constexpr (kInPlace) await_readers(window, epoch, patience);\n",
        DEADLOCK, combining=IN_PLACE, race_detector=False),
    Bug("offer-rows-of-all-ranks", "phases/in_place.cuh", "own.rows + first_of_lane * own.row_words", "own.rows",
        "combined_x differs", combining=IN_PLACE, race_detector=False),
    Bug("offer-weights-of-all-ranks", "phases/in_place.cuh", "own.beside + first_of_lane * own.beside_words",
        "own.beside", "combined_topk_weights differs", combining=IN_PLACE, race_detector=False),
    Bug("scale-factors-of-another-token", "phases/copy_out.cuh", "beside + int64_t(token_.token)",
        "beside + int64_t(token_.slot)", "recv_sf differs", combining=IN_PLACE, race_detector=False),
    # Rows of the expanded layout.
    Bug("sum-without-fence", "phases/push_rows.cuh", "if (row_ends || kReturn == Return::kSum)",
        "if (row_ends && kReturn != Return::kSum)", RACE, combining=SUMS),
    Bug("sum-of-own-rows-unrounded", "phases/reduce.cuh", "parts.sum = device::ballot(own && selection.speaks);", "",
        "differs", combining=SUMS),
    Bug("own-sum-first", "phases/reduce.cuh", "parts.lanes & (parts.sum - 1)",
        "parts.lanes & (parts.sum - 1) & -(parts.sum == 0)",
        "differs", combining=SUMS),
    Bug("announce-the-first-row", "phases/push_rows.cuh", ".last = last}", ".last = row_ends}", RACE,
        combining=EVERY_ROW),
    Bug("row-of-the-next-selection", "phases/push_rows.cuh", "parcel.place + k", "parcel.place + k + 1", "",
        combining=EVERY_ROW),
    Bug("rows-relaxed", "phases/reduce.cuh", "load_acquire_sys", "load_relaxed_sys", RACE, combining=EVERY_ROW),
    # The ring.
    Bug("ring-without-mbarrier-wait", "phases/ring.cuh", "device::mbarrier_wait(", "static_cast<void>(", ""),
    Bug("ring-waits-for-one-parity", "phases/ring.cuh", "drained / kStages & 1", "0", ""),
    Bug("reuse-a-stage", "phases/ring.cuh", "        device::bulk_wait_read<kStoring>();\n", "", RACE),
    Bug("ring-without-mbarrier-fence", "phases/ring.cuh", "device::fence_mbarrier_init();", "", "fence_mbarrier_init"),
    # Synchronisation of warps and blocks.
    Bug("reduce-without-sync", "phases/reduce.cuh", "device::sync_warp();  // one lane has acquired for all", "", RACE),
    Bug("ring-without-sync", "phases/ring.cuh", SYNC_WARP, "", RACE, times=3),
    Bug("count-without-sync", "phases/count.cuh", "  device::sync_warp();\n", "", RACE),
    Bug("count-in-without-sync", "phases/route.cuh", "number] : 0;\n  device::sync_warp();\n", "number] : 0;\n", RACE),
    Bug("route-without-sync", "phases/route.cuh", SYNC_WARP, "", RACE, times=2),
    Bug("announce-oneself-without-sync", "phases/announce.cuh", "device::sync_warp();  // one lane has waited for all",
        "", RACE, num_tokens=MANY_TOKENS, combining=SUMS),
    Bug("mailbox-filled-again-too-soon", "phases/announce.cuh", "if (handed_over_ > 0) device::mbarrier_wait",
        "if (false) device::mbarrier_wait", RACE, num_tokens=MANY_TOKENS),
    Bug("dispatch-without-sync", "kernels/dispatch.cuh", "  device::sync_block();\n", "", "", times=2),
    Bug("recall-without-sync", "kernels/dispatch.cuh", "  device::sync_block();\n  // Nothing is taken back",
        "  // Nothing is taken back", RACE),
    Bug("counting-without-sync", "wire/blocks.cuh", "device::sync_named(1, num_counting_threads());", "", RACE),
    Bug("collect-without-sync", "phases/collect.cuh", "  device::sync_warp();\n\n", "", RACE),
    # Places.
    Bug("stage-at-the-next-slot", "phases/push_rows.cuh", ".row = parcel.slot,", ".row = parcel.slot + 1,", ""),
    Bug(
        "next-row", "phases/copy_out.cuh", "row_base[token_.source] + token_.slot,",
        "row_base[token_.source] + token_.slot + 1,", "",
    ),
    Bug("one-row-of-padding-too-many", "phases/blank.cuh", "start + align_up(count, alignment)",
        "start + align_up(count, alignment) + 1", ""),
    Bug("count-oneself-twice", "phases/route.cuh", "return before + device::popcount(same & device::lanes_below())",
        "return before + device::popcount(same & device::lanes_below()) + 1", ""),
    # Who asks what the others call, and tells of it.
    Bug("agree-with-anything", "phases/agree.cuh", "device::ballot(came && theirs != mine && item != kTokensItem)",
        "device::ballot(false)",
        "was told '", stories="mishaps", race_detector=False),
    Bug("agree-whatever-the-handle", "phases/agree.cuh", "came && theirs != mine", "came && item < 5 && theirs != mine",
        "was told ''", stories="mishaps", num_seeds=64, race_detector=False),
    Bug("agree-with-the-first-warpful", "phases/agree.cuh", "first < num_words;", "first < 32;",
        "was told '", stories="mishaps", num_seeds=128, race_detector=False),
    Bug("agree-on-the-call-before", "phases/agree.cuh", "plan_word(window, epoch, window.rank, source, item)",
        "plan_word(window, epoch - 1, window.rank, source, item)", "in agree: for rank", stories="mishaps",
        race_detector=False),
    Bug("agree-with-oneself", "phases/agree.cuh", "plan_word(window, epoch, window.rank, source, item)",
        "plan_word(window, epoch, window.rank, item == kTokensItem ? source : window.rank, item)", "was told '",
        stories="mishaps",
        race_detector=False),
    Bug("read-in-place-whoever-agrees", "kernels/combine.cuh", "agree(a.window, epoch, plan, a.patience) && find_rows",
        "agree(a.window, epoch, plan, a.patience) | find_rows", "past the end of 'window of rank", stories="mishaps",
        num_seeds=128, race_detector=False),
    Bug("blame-oneself", "phases/agree.cuh", "{.phase = where, .peer = source, .expected = mine}, theirs",
        "{.phase = where, .peer = source, .expected = theirs}, mine", "without", stories="mishaps",
        race_detector=False),
    # Barriers.
    Bug("barrier-that-waits-for-nobody", "kernels/barrier.cuh", "admit_warp(a.window, epoch + 1, a.patience);", ";",
        RACE, stories="barriers"),
    Bug("barrier-that-acquires-nothing", "phases/admit.cuh", "load_acquire_sys", "load_relaxed_sys", RACE,
        stories="barriers"),
    Bug("barrier-that-releases-nothing", "phases/retire.cuh", "store_release_sys", "store_relaxed_sys", RACE,
        times=2, stories="barriers"),
    Bug("claim-in-two-steps", "phases/claims.cuh", "asked_ = device::fetch_add_relaxed_gpu(counter_, 1u);",
        "asked_ = device::load_relaxed_gpu(counter_), device::store_relaxed_gpu(counter_, asked_ + 1);", "",
        num_sms=TWO_SENDERS),
    Bug("look-back-at-all-blocks", "phases/look_back.cuh", "first + j < device::block_idx()", "first + j < team.end()",
        "", num_sms=TWO_SENDERS, num_tokens=MANY_TOKENS),
    Bug("publish-before-the-answer", "kernels/dispatch.cuh", "  hear_answer();", "  publish(a.window, epoch, team, "
        "a.routing.experts_per_rank, tables);\n  hear_answer();", RACE),
    Bug("neighbours-that-overlap", "wire/blocks.cuh", "return {warp * blocks.count + blocks.own(),",
        "return {warp + blocks.own(),", "", num_sms=TWO_SENDERS, num_tokens=MANY_TOKENS),
    Bug("backwards-by-one", "wire/blocks.cuh", "{count - 1 - own, count}", "{count - own, count}", "",
        race_detector=False),
    Bug("publish-what-one-block-counted", "phases/publish.cuh", "tables.expert_total[rank", "tables.expert_below[rank",
        "", num_sms=TWO_SENDERS, num_tokens=MANY_TOKENS),
    Bug("rank-for-a-position", "phases/route.cuh", "Place{routed.expert, position}.packed()",
        "Place{routed.expert, rank}.packed()", "", race_detector=False),
    Bug("scale-of-the-word-before", "phases/payload.cuh", "    scales.at(row, i) =",
        "    scales.at(row, i - (i > 0)) =", "", race_detector=False),
    # Routes that are known, and what is told about them.
    Bug("recall-aligned-ends", "phases/recall.cuh", "known.per_expert_end[e] - known.per_expert[e];",
        "known.per_expert_aligned[e] - known.per_expert[e];", "differs", race_detector=False),
    Bug("report-counts-of-one-source", "phases/report.cuh", "out.per_expert_end[e] = start + count;",
        "out.per_expert_end[e] = tables.expert_row[experts_per_rank + e];", "differs", race_detector=False),
    Bug("statistics-by-every-block", "kernels/dispatch.cuh", "if (receives && receivers.own() == 0) {",
        "if (receives) {", "", num_sms=TWO_SENDERS),
    Bug("one-unused-row-unsaid", "phases/blank.cuh", "int64_t(used_rows) * columns + thread",
        "int64_t(used_rows + 1) * columns + thread", "", race_detector=False),
    Bug("rows-of-the-column-before", "phases/results.cuh", "(num_topk + 2) + 2 + k]", "(num_topk + 2) + 1 + k]", "",
        combining=SUMS, race_detector=False),
    Bug("second-row-first", "phases/sum.cuh", "      add(rows[0]);\n",
        "      if (count > 1) add(rows[1]), rows[1] = rows[0];\n      if (count == 1) add(rows[0]);\n",
        "differs", combining=EVERY_ROW, race_detector=False),
    # From one operation to the next.
    Bug(
        "plan-words-of-all-epochs-in-one-place",
        "phases/agree.cuh",
        "(epoch & 1) *",
        "0 *",
        DEADLOCK,
        num_tokens=0,
        race_detector=False,
        # One who asks late: the peer, of whom nothing comes, may have begun the next call by then.
        beside=((
            "kernels/dispatch.cuh",
            "  const bool all_agree = agree(",
            "  for (int i = 0; counts && i < 2000; ++i) device::sync_warp();\n  const bool all_agree = agree(",
        ),),
    ),
    Bug("enter-unadmitted", "phases/admit.cuh", "seen == epoch ? epoch - 1 : seen;", "epoch - 1 + 0 * seen;", RACE),
    Bug("combine-unadmitted", "phases/push_rows.cuh",
        "  if (!admit_warp(window, epoch, patience)) return announcer.finish();\n", "", RACE),
    Bug("admit-relaxed", "phases/admit.cuh", "load_acquire_sys", "load_relaxed_sys", RACE),
    Bug("drained-relaxed", "phases/retire.cuh", "store_release_sys", "store_relaxed_sys", RACE, times=2),
    Bug("blocks-done-relaxed", "phases/retire.cuh", "fetch_add_acq_rel_gpu", "fetch_add_relaxed_gpu", RACE),
    Bug("retire-without-sync", "phases/retire.cuh", "  device::sync_block();\n", "", RACE),
    Bug("receive-without-room", "kernels/dispatch.cuh", "receives = receiver && good && can;",
        "receives = receiver && good;", "", do_cpu_sync=True, race_detector=False),
    Bug("receive-with-nobody", "kernels/dispatch.cuh", "return a.num_receive_blocks > 0 &&", "return", "",
        do_cpu_sync=True, race_detector=False),
    Bug("room-for-tokens-alone", "phases/room.cuh", "expanded_rows <= most.expanded_rows", "true", "",
        do_cpu_sync=True, race_detector=False),
    Bug("room-for-expanded-rows-alone", "phases/room.cuh", "rows <= most.rows", "true", "",
        do_cpu_sync=True, race_detector=False),
    Bug("any-room-for-few-tokens", "phases/room.cuh", "least.rows <= rows", "true", "", do_cpu_sync=True,
        race_detector=False),
    Bug("any-room-for-few-expanded-rows", "phases/room.cuh", "least.expanded_rows <= expanded_rows", "true", "",
        do_cpu_sync=True, race_detector=False),
    Bug("room-without-padding", "phases/room.cuh", "align_up(tables.coming[last], alignment)", "tables.coming[last]",
        "", do_cpu_sync=True, race_detector=False),
    Bug("wait-for-receivers-that-nobody-needs", "kernels/dispatch.cuh", "reports && (can || !learned)",
        "reports && !learned", "", do_cpu_sync=True, race_detector=False),
    Bug("retire-before-anything-was-received", "kernels/dispatch.cuh", "reports && (can || !learned)", "reports", "",
        do_cpu_sync=True, race_detector=False),
    Bug("retire-with-the-blocks-of-one-launch", "kernels/dispatch.cuh", "a.patience, a.num_blocks, 1 + num_others",
        "a.patience, device::num_blocks(), 1 + num_others", "", do_cpu_sync=True, race_detector=False),
    Bug("same-epoch-again", "phases/retire.cuh", "    device::store_relaxed_gpu(&own.epoch, epoch);\n", "", ""),
    Bug("claims-not-reset", "phases/retire.cuh", "device::store_relaxed_gpu(&claimed, 0u);",
        "static_cast<void>(claimed);", ""),
    Bug("blocks-done-not-reset", "phases/retire.cuh", "    device::store_relaxed_gpu(&own.blocks_done, 0u);\n", "", ""),
)  # fmt: skip
