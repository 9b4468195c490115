import gc

from services.gateway.service import GatewayService
from services.gateway.settings import GatewaySettings
from shared.service import run_stage

if __name__ == "__main__":
    # Events and deltas die by their reference counts: the collector would look through them in the middle of a step.
    gc.set_threshold(100_000, 50, 100)
    run_stage(GatewayService, GatewaySettings)
