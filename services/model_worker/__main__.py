"""`python -m services.model_worker`: one worker process."""

from services.model_worker.engine_api import Engine, OnFatal, OnSteps
from services.model_worker.service import WorkerService
from services.model_worker.settings import WorkerSettings
from shared.bus import Bus
from shared.service import run_stage


def make_engine(settings: WorkerSettings, on_steps: OnSteps, on_fatal: OnFatal) -> Engine:
    if settings.engine == "fixed":
        from services.model_worker.fixed_engine import FixedEngine

        return FixedEngine(settings.fixed, settings.max_seqs, settings.max_waiting, on_steps, on_fatal)
    from services.model_worker.threaded_engine import ThreadedEngine

    return ThreadedEngine(settings, on_steps, on_fatal)


class ModelWorker(WorkerService):
    def __init__(self, bus: Bus, settings: WorkerSettings) -> None:
        super().__init__(bus, settings, make_engine)


if __name__ == "__main__":
    run_stage(ModelWorker, WorkerSettings)
