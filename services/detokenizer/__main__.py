from services.detokenizer.service import DetokenizerService
from services.detokenizer.settings import DetokenizerSettings
from shared.service import run_stage

if __name__ == "__main__":
    run_stage(DetokenizerService, DetokenizerSettings)
