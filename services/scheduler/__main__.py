from services.scheduler.service import SchedulerService
from services.scheduler.settings import SchedulerSettings
from shared.service import run_stage

if __name__ == "__main__":
    run_stage(SchedulerService, SchedulerSettings)
