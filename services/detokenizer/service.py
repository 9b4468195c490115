"""The detokenizer stage: owns partitions of the token log, as the heartbeats of its like say.

A partition changes hands without a pause: whoever is to give it up goes on serving until it hears the new owner's beacon. For that
moment there are two owners, who say the same.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgpack
from tokenizers import Tokenizer

from services.detokenizer.decoding import NewDecoding, decoder_for
from services.detokenizer.ownership import Fleet, partitions_of
from services.detokenizer.partition import Partition
from services.detokenizer.recorder import Recorder
from services.detokenizer.settings import DetokenizerSettings
from shared import codec, subjects
from shared.bus import Bus, BusError, Message, Subscription
from shared.messages import Heartbeat
from shared.retry import until_done
from shared.service import Service

TICK = 0.05  # how often ownership is looked at, seconds
HANDOVER = 10.0  # seconds that a new owner gets to catch up: a log that was lost has less in it than was folded here


class DetokenizerService(Service):
    stage = "detokenizer"
    settings: DetokenizerSettings

    def __init__(self, bus: Bus, settings: DetokenizerSettings, new_decoding: NewDecoding | None = None) -> None:
        """`new_decoding` stands in for the model's tokenizer (tests)."""
        super().__init__(bus, settings)
        self.partitions: dict[int, Partition] = {}
        self._new_decoding = new_decoding
        self._fleet = Fleet(self.instance, settings.silence_grace)
        self._leaving: dict[int, Subscription] = {}  # partitions that go to another owner, and the ear for its beacon
        self._changing = asyncio.Lock()
        self._tokens_before = 0  # committed in partitions that are another's now
        replays = self.endpoint("replay", subjects.replay(settings.model, "*"))
        prefixes = self.endpoint("prefix", subjects.prefix(settings.model, "*"))
        attaches = self.endpoint("attach", subjects.attach(settings.model, "*"))
        self._recorder = Recorder(self.meter, self.tracer, replays, prefixes, attaches)

    # ------------------------------------------------ life

    async def on_start(self) -> None:
        if self._new_decoding is None:
            self._new_decoding = decoder_for(load_tokenizer(self.settings.model_path))
        heartbeats = subjects.heartbeats(self.stage, self.settings.model)
        await until_done("subscribe", heartbeats, lambda: self.bus.subscribe(heartbeats, self._on_heartbeat))
        await asyncio.sleep(2.5 * self.settings.heartbeat_interval)  # to hear who is there before claiming anything
        self.spawn(self._look_forever(), "ownership")
        self.spawn(self._shine_forever(), "beacons")

    async def on_drain(self) -> None:
        """Serves on until every partition is somebody else's, or nobody else is there."""
        while self.partitions and self._others():  # noqa: ASYNC110 - both change with the next look
            await asyncio.sleep(TICK)

    async def on_stop(self) -> None:
        async with self._changing:
            for number in list(self.partitions):
                await self._give_up(number)

    def heartbeat(self) -> Heartbeat:
        partitions = self.partitions.values()
        live = sum(not answer.ended for p in partitions for answer in p.core.answers.values())
        return self.base_heartbeat(
            in_flight=live,
            partitions=len(self.partitions),
            serving=sum(p.serving for p in partitions),
            tokens=self._tokens_before + sum(p.core.tokens for p in partitions if p.serving),
            backlog=sum(p.backlog for p in partitions),
        )

    # ------------------------------------------------ ownership

    def _on_heartbeat(self, message: Message) -> None:
        beat = codec.decode_as(Heartbeat, message.data)
        self._fleet.saw(beat, asyncio.get_running_loop().time())

    def _others(self) -> frozenset[str]:
        return self._fleet.others(asyncio.get_running_loop().time(), self.bus.connected_for)

    async def _look_forever(self) -> None:
        while True:
            await asyncio.sleep(TICK)
            try:
                await self._look()
            except BusError as error:
                self.log.warning("ownership_unsettled", error=repr(error))

    async def _look(self) -> None:
        others = self._others()
        if self.draining and not others:
            return  # nobody to hand over to: serve until the end
        nodes = others if self.draining else others | {self.instance}
        mine = partitions_of(self.instance, nodes, self.settings.model, self.settings.partitions)
        for number in mine - self.partitions.keys():
            self._take(number)
        for number in mine & self._leaving.keys():
            if (subscription := self._leaving.pop(number, None)) is not None:
                await subscription.unsubscribe()
        for number in self.partitions.keys() - mine - self._leaving.keys():
            await self._offer(number)

    def _take(self, number: int) -> None:
        assert self._new_decoding is not None
        partition = Partition(self.bus, self.settings, number, self._new_decoding, self.spawn, self._recorder)
        self.partitions[number] = partition
        self._recorder.taken()
        partition.start()
        self.log.info("partition_taken", partition=number)

    async def _offer(self, number: int) -> None:
        """Serves on until the new owner's beacons say that it has come to where this one stood at the first of them. (One that stood
        still for a while believes that it has been the owner all the time.)"""
        due: tuple[int, float] | None = None
        loop = asyncio.get_running_loop()

        def on_beacon(message: Message) -> None:
            nonlocal due
            owner, seq = msgpack.unpackb(message.data)
            if owner == self.instance or number not in self._leaving:
                return
            due = due or (self.partitions[number].core.seq, loop.time() + HANDOVER)
            if seq >= due[0] or loop.time() > due[1]:
                self.spawn(self._hand_over(number), f"give_up.{number}")

        self._leaving[number] = await self.bus.subscribe(subjects.beacon(self.settings.model, number), on_beacon)

    async def _hand_over(self, number: int) -> None:
        async with self._changing:
            if number in self._leaving:  # else it is done (each beacon asks for it), or the partition is to be kept
                await self._give_up(number)

    async def _give_up(self, number: int) -> None:
        subscription = self._leaving.pop(number, None)
        partition = self.partitions.pop(number, None)
        if subscription is not None:
            await subscription.unsubscribe()
        if partition is not None:
            served = partition.serving
            await partition.close()
            self._tokens_before += partition.core.tokens if served else 0
            self.log.info("partition_given_up", partition=number)

    async def _shine_forever(self) -> None:
        while True:
            for number, partition in self.partitions.items():
                if partition.serving:
                    beacon = codec.pack((self.instance, partition.core.seq))
                    self.bus.publish(subjects.beacon(self.settings.model, number), beacon)
            await asyncio.sleep(self.settings.beacon_interval)


def load_tokenizer(folder: str) -> Tokenizer:
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: the model has no tokenizer.json")
    return Tokenizer.from_file(str(path))
