import gc

from services.detokenizer.service import DetokenizerService
from services.detokenizer.settings import DetokenizerSettings
from shared.service import run_stage

if __name__ == "__main__":
    # Entries and events die by their reference counts. The collector finds next to nothing, and pauses every stream to look for it.
    gc.set_threshold(100_000, 50, 100)
    run_stage(DetokenizerService, DetokenizerSettings)
