"""Packages in place of wandb, mlflow and trackio, with the signatures of the real ones.

`STORE` is what their servers would keep: it outlives the processes of a run.
"""

import importlib.machinery
import sys
import types

STORE: dict[str, dict] = {"wandb": {}, "mlflow": {}, "trackio": {}}
NAMES = ("wandb", "mlflow", "mlflow.entities", "mlflow.exceptions", "mlflow.tracking", "trackio")
OWN = tuple(f"sdjax.train.trackers.{name}_runs" for name in ("wandb", "mlflow", "trackio"))


def install(monkeypatch):
    """Put the fakes into `sys.modules`, and empty what they keep."""
    for kept in STORE.values():
        kept.clear()
    modules = {"wandb": wandb(), **mlflow(), "trackio": trackio()}
    for name in NAMES:
        modules[name].__spec__ = importlib.machinery.ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, modules[name])
    for name in OWN:
        monkeypatch.delitem(sys.modules, name, raising=False)
    return modules


def uninstall():
    """Forget the modules of sdjax that have the fakes inside."""
    for name in OWN:
        sys.modules.pop(name, None)


# ---- W&B -------------------------------------------------------------------------------------


class WandbRun:
    """A run that, as W&B's, drops rows whose `step=` is not above that of the row before."""

    def __init__(self, id, resume):
        kept = STORE["wandb"]
        assert resume == "allow"
        self.kept = kept.setdefault(id, {"rows": [], "row": 0, "metrics": {}, "config": {}})
        self.kept["opened"] = self.kept.get("opened", 0) + 1
        self.id, self.url = id, f"https://wandb.invalid/{id}"
        self.config = self

    def update(self, d, allow_val_change=None):
        """As of `run.config`."""
        changed = {k for k, v in d.items() if k in self.kept["config"]} if d else set()
        assert allow_val_change or not changed
        self.kept["config"].update(d)

    def define_metric(self, name, step_metric=None, step_sync=None, hidden=None, summary=None,
                      overwrite=None):  # fmt: skip
        """As of the real one."""
        self.kept["metrics"][name] = step_metric

    def log(self, data, step=None, commit=None):
        """As of the real one."""
        step = self.kept["row"] if step is None else step
        if step < self.kept["row"]:
            return  # "Tried to log to step 3 that is less than the current step 5"
        self.kept["rows"].append(dict(data))
        self.kept["row"] = step + 1

    def finish(self, exit_code=None):
        """As of the real one."""
        self.kept["finished"] = True


def wandb():
    """The package."""
    module = types.ModuleType("wandb")

    def init(entity=None, project=None, dir=None, id=None, name=None, notes=None, tags=None,
             config=None, config_exclude_keys=None, config_include_keys=None, group=None,
             job_type=None, mode=None, force=None, reinit=None, resume=None,
             settings=None):  # fmt: skip
        run = WandbRun(id, resume)
        run.kept.update(project=project, name=name, dir=dir)
        return run

    class Settings:
        def __init__(self, **values):
            self.__dict__.update(values)

    class Image:
        def __init__(self, data_or_path, mode=None, caption=None):
            self.data, self.caption = data_or_path, caption

    module.init, module.Settings, module.Image, module.Run = init, Settings, Image, WandbRun
    module.setup = lambda settings=None: None
    return module


# ---- MLflow ----------------------------------------------------------------------------------


class MlflowException(Exception):
    """As of the real one."""

    def __init__(self, message, error_code="INTERNAL_ERROR"):
        super().__init__(message)
        self.error_code = error_code


class MlflowClient:
    """As of the real one, as far as runs go."""

    def _run(self, run_id):
        if run_id not in STORE["mlflow"]:
            raise MlflowException(f"Run '{run_id}' not found", "RESOURCE_DOES_NOT_EXIST")
        return STORE["mlflow"][run_id]

    def create_run(self, experiment_id, start_time=None, tags=None, run_name=None):
        """As of the real one."""
        id = f"{len(STORE['mlflow']):032x}"
        STORE["mlflow"][id] = {"metrics": [], "params": {}, "images": [], "name": run_name,
                               "status": "RUNNING", "experiment": experiment_id}  # fmt: skip
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id=id))

    def get_run(self, run_id):
        """As of the real one."""
        params = dict(self._run(run_id)["params"])
        return types.SimpleNamespace(data=types.SimpleNamespace(params=params))

    def update_run(self, run_id, status=None, name=None):
        """As of the real one."""
        self._run(run_id)["status"] = status

    def log_batch(self, run_id, metrics=(), params=(), tags=(), synchronous=None):
        """As of the real one, with its limits."""
        run = self._run(run_id)
        assert len(params) <= 100 and len(metrics) <= 1000
        for param in params:
            if run["params"].get(param.key, param.value) != param.value:
                raise MlflowException("Changing param values is not allowed")
            run["params"][param.key] = param.value
        run["metrics"] += [(m.key, m.value, m.step) for m in metrics]

    def log_dict(self, run_id, dictionary, artifact_file):
        """As of the real one."""
        self._run(run_id)[artifact_file] = dictionary

    def log_image(self, run_id, image, artifact_file=None, key=None, step=None, timestamp=None,
                  synchronous=None):  # fmt: skip
        """As of the real one."""
        self._run(run_id)["images"].append((key, step, image.shape))

    def set_terminated(self, run_id, status=None, end_time=None):
        """As of the real one."""
        self._run(run_id)["status"] = status


def mlflow():
    """The package, and those of its modules that are imported by themselves."""
    top, entities, exceptions, tracking = (types.ModuleType(name) for name in NAMES[1:5])
    top.get_tracking_uri = lambda: "sqlite:///mlflow.db"
    top.set_experiment = lambda name: types.SimpleNamespace(experiment_id=name)
    entities.Metric = lambda key, value, timestamp, step: types.SimpleNamespace(
        key=key, value=value, timestamp=timestamp, step=step
    )
    entities.Param = lambda key, value: types.SimpleNamespace(key=key, value=value)
    entities.RunStatus = types.SimpleNamespace(FINISHED=3, to_string={3: "FINISHED"}.get)
    exceptions.MlflowException, tracking.MlflowClient = MlflowException, MlflowClient
    return dict(zip(NAMES[1:5], (top, entities, exceptions, tracking), strict=True))


# ---- trackio ---------------------------------------------------------------------------------


class TrackioRun:
    """As of the real one."""

    def __init__(self, name):
        self.kept = STORE["trackio"].setdefault(name, {"rows": []})

    def log(self, metrics, step=None):
        """As of the real one."""
        self.kept["rows"].append((step, dict(metrics)))

    def finish(self):
        """As of the real one."""
        self.kept["finished"] = True


def trackio():
    """The package."""
    module = types.ModuleType("trackio")

    def init(project, name=None, group=None, space_id=None, server_url=None, dataset_id=None,
             bucket_id=None, config=None, resume="never", settings=None, private=None, embed=True,
             auto_log_gpu=None, gpu_log_interval=10.0, auto_log_cpu=None, cpu_log_interval=10.0,
             webhook_url=None, webhook_min_level=None):  # fmt: skip
        assert resume == "allow" and not embed
        run = TrackioRun(name)
        run.kept.update(project=project, config=config)
        return run

    class Image:
        def __init__(self, value, caption=None):
            self.data, self.caption = value, caption

    module.init, module.Run, module.Image = init, TrackioRun, Image
    return module
