"""A sampler for verl on a CPU: transformers in a Ray actor, in the place of vLLM. verl imports it like cpu_platform."""

from functools import partial

import ray
import torch
import transformers
from verl.utils import distributed, fsdp_utils
from verl.workers.rollout import base
from verl.workers.rollout.replica import RolloutReplica, RolloutReplicaRegistry, TokenOutput

SERVER = "cpu-sampler"

# verl would ask for the backend "cpu:gloo,cpu:gloo", which torch refuses.
distributed.initialize_global_process_group_ray = partial(
    distributed.initialize_global_process_group_ray, backend="gloo"
)
offload = fsdp_utils.CPUOffloadPolicy
fsdp_utils.CPUOffloadPolicy = lambda pin_memory: offload(pin_memory=False)  # nothing pins memory without an accelerator


class Server:
    def __init__(self, path, length):
        torch.set_num_threads(1)
        self.model, self.length = transformers.AutoModelForCausalLM.from_pretrained(path).eval(), length
        self.end, self.updates = self.model.config.eos_token_id, 0

    @torch.no_grad()
    def generate(self, request_id, prompt_ids, sampling_params, **_media):
        ids, logps = torch.tensor([prompt_ids]), []
        for _ in range(self.length):
            every = (self.model(ids).logits[0, -1] / max(sampling_params["temperature"], 1e-3)).log_softmax(-1)
            token = torch.multinomial(every.exp(), 1)
            logps.append(float(every[token]))
            ids = torch.cat([ids, token[None]], dim=1)
            if int(token) == self.end:
                break
        sampled, extra = ids[0, len(prompt_ids) :].tolist(), {"global_steps": self.updates}
        return TokenOutput(token_ids=sampled, log_probs=logps, stop_reason="completed", extra_fields=extra)

    def load(self, weights, updates):
        self.updates = updates
        self.model.load_state_dict(weights, strict="lm_head.weight" in weights)
        self.model.tie_weights()

    def nothing(self, *_args, **_kwargs):
        """There is no cache and no memory to be given back."""

    wake_up = sleep = abort_all_requests = resume_generation = clear_kv_cache = nothing


class Replica(RolloutReplica):
    async def launch_servers(self):
        self._server_handle = (
            ray.remote(Server).options(name=SERVER).remote(self.model_config.path, self.config.response_length)
        )
        self.servers, self._server_address = [self._server_handle], SERVER


class Adapter(base.BaseRollout):
    async def resume(self, tags):
        pass

    async def release(self):
        pass

    async def update_weights(self, weights, global_steps=0, **_others):
        weights = {name: weight.detach().float() for name, weight in weights}
        await ray.get_actor(SERVER).load.remote(weights, global_steps)


RolloutReplicaRegistry.register("cpu", lambda: Replica)
base._ROLLOUT_REGISTRY["cpu", "async"] = f"{__name__}.Adapter"
