# What Snakemake does around a job must not undo what the commands promise (docs/reliability.md). Included last.
import datetime
import shlex
import tempfile
import time

from snakemake.persistence import PersistenceBase

# Results stay until better ones are there. By itself Snakemake removes the outputs of a job before it starts; those that
# are to be updated it puts back when the job fails. But then it takes them for the outcome of that job, and would never
# make them again: here they stay marked as incomplete.
for one in workflow.rules:  # by another name snakemake --lint would take this for a rule
    for file in one.output:
        file.set_flags({**file.flags, "update": True})

put_back = set()


def restore_output(persistence, path, restore=PersistenceBase.restore_output):
    kept = persistence._get_backup_path(path).exists()
    elsewhere = (
        workflow.is_main_process and workflow.nodes is not None and os.path.exists(path)
    )  # put back where it ran
    if not kept and not elsewhere:  # there was none before the job
        return False
    put_back.add(str(path))
    return restore(persistence, path) if kept else True


async def record(persistence, job, finished=PersistenceBase.finished):
    if put_back.isdisjoint(job.output):
        await finished(persistence, job)
    put_back.difference_update(job.output)


PersistenceBase.restore_output = restore_output
PersistenceBase.finished = record

# A command whose log lies on a full disk says its last line here.
shell.prefix("exec 3>&2; export GDN_MUP_LAST_LINE=3; ")

WAITED_FOR_SECONDS = 10  # clocks that differ by less are waited for


def get_seconds_ahead(files: list[str]) -> dict[str, float]:
    """By how much files are dated in the future, by the clock that dates what is written here."""
    with tempfile.NamedTemporaryFile(dir=".snakemake") as now:
        clock = os.stat(now.name).st_mtime
    ahead = {name: os.stat(name).st_mtime - clock for name in files if os.path.exists(name)}
    return {name: seconds for name, seconds in ahead.items() if seconds > 0}


# Snakemake would run a job to its end, find its output older than an input, and remove it.
onstart:
    jobs = list(workflow.dag.needrun_jobs())
    made = {file for job in jobs for file in job.output}
    ahead = get_seconds_ahead(sorted({str(file) for job in jobs for file in job.input if file not in made}))
    if ahead and max(ahead.values()) < WAITED_FOR_SECONDS:
        time.sleep(max(ahead.values()))
    elif ahead:
        first, *others = ahead
        date = datetime.datetime.fromtimestamp(os.stat(first).st_mtime)
        stop(
            UserError(
                f"{first}: dated in the future ({date:%Y-%m-%d %H:%M})"
                + f", as {len(others)} more input{'s' * (len(others) > 1)}" * bool(others)
                + f", so that no output would be newer; date what is right: `touch {shlex.join(ahead)}`"
            )
        )


if workflow.is_main_process and any(
    str(method) == "conda" for method in workflow.deployment_settings.deployment_method
):
    stop(
        UserError(
            "--sdm conda: one environment serves every rule, and cannot be made for each; create it with `conda env create "
            "-f environment.yml`, activate it, and run snakemake without --sdm"
        )
    )
