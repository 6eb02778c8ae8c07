"""Lightning's side: the hooks of the strategy, and all that Lightning's training loop forces.

Of the package, this folder, the callbacks, the command line and the two faces
(`lightning_byz.lightning`, `lightning_byz.pytorch_lightning`) know Lightning; nothing else may.
Callbacks and faces import it.

* The hooks: `strategy`; those about processes: `process_hooks`. The names of strategies: `names`.
* Before the first step: `resolve` decides f, the algorithm and the transport where the user left
  them open; `validate` refuses what cannot work.
* Forward and backward: `workers` computes this process's workers, one after the other, and
  `workers_at_once` in one pass (`stacked_pass`) where that gives the same;
  `extra_gradients` computes further gradients (at earlier parameters, over all data, on trusted
  data); `module_attributes`, `module_buffers` (which also merges BatchNorm's statistics) and
  `random_states` give each worker its own;
  `step_outputs` joins what training steps return, `step_logs` what they log.
* When workers exchange is an interface, `sync`.
* From backward to ``p.grad``: `gradient_sync` says when, `gradient_exchange` runs the round and
  writes the result, `overlap` sends messages while backward still runs, `flat_parameters` lies
  between a model and vectors.
* Local steps: `local_steps` is what a user says of them, `phases` says when a phase ends and takes
  the outer step, `workers_apart` computes workers that have parameters of their own, and
  `optimizer_states` keeps what an optimizer remembers for each.
* After a round: `round_report` says who was silent and stops a run that has diverged;
  `unmoved_parameters` finds those that too few workers use.
* Processes: `processes` (torch.distributed, or one), `server_processes` (a parameter server, whose
  workers may die and come back), `reductions` of what ranks report.
* Models that several processes hold together: `mesh` says which ranks are a replica, and which
  parts of a parameter they have; `mesh_processes`, `replica_worker` and `sharded_parameters` are
  such processes, worker and vectors; `model_hooks` and `model_shards` set the model up, save and
  load it, with the algorithm's state (`sharded_state`); `validate_shards` refuses what cannot work.
* Checkpoints: `checkpoint` saves and restores, `resuming_with_others` fits one to other workers,
  `checkpoint_barrier` notices a rank that saves alone.
* `private_names`: the private names of torch and Lightning that are used, and no others.
"""

from typing import TYPE_CHECKING, Any

from lightning_byz.which_lightning import of_home

if TYPE_CHECKING:
    from lightning_byz.lightning import ByzantineRobustStrategy

__all__ = ["ByzantineRobustStrategy"]


def __getattr__(name: str) -> Any:
    return of_home(__name__, name, __all__)
