from services.tokenizer.service import TokenizerService
from services.tokenizer.settings import TokenizerSettings
from shared.service import run_stage

if __name__ == "__main__":
    run_stage(TokenizerService, TokenizerSettings)
