"""One step of the training: the critics learn, then the generator, then its average follows.

A critic's loss is in Critic.py. Everything random in a step is a pure function of (seed, step).
"""

import torch

from augmentation import NUMBERS, augment
from Critic import clip_weights, critic_loss, generator_loss, gradient_penalty
from Dataset import batch_indices, seeded
from distributed import average_over_ranks, gather_batch, mean_over_ranks, share_of_batch
from FrechetLoss import EVERY as FRECHET_EVERY


def draw_noise(settings, step):
    """Return all random numbers of a step, drawn on the CPU from (seed, step), so that they are the same everywhere.

    z: (n_critic + 1, B, nz) latents, the last for the generator.  epsilon: (n_critic, B, 1, 1, 1) in [0, 1).
    flip: (n_critic, B, 1, 1, 1) bool.  augment: (n_critic + 1, B, 2, NUMBERS) in [0, 1), for fake and real images.
    """
    random, n, b = seeded(settings.seed, 1, step), settings.n_critic, settings.batch_size
    return {
        "z": torch.randn(n + 1, b, settings.nz, generator=random),
        "epsilon": torch.rand(n, b, 1, 1, 1, generator=random),
        "flip": (torch.rand(n, b, 1, 1, 1, generator=random) < 0.5) & settings.flip,
        "augment": torch.rand(n + 1, b, 2, NUMBERS, generator=random),
    }


def batches_of(state, settings):
    """Return which of the batches of a step are taken: one for each update of the pixel critic, else the last alone."""
    return range(settings.n_critic)[0 if state.critic else -1 :]


def critic_step(state, settings, real, fake, epsilon):
    """Update the pixel critic once. real, fake: (B, 3, S, S) without a graph; epsilon: (B, 1, 1, 1).

    Returns its scalars by their names in TensorBoard; all but the norm are about this rank's share of the batch.
    """
    scalars, penalty = {}, real.new_zeros(())
    if settings.loss == "wgan-gp":
        # A backward pass of its own: the gradients add up, and the graphs are never in memory together.
        with autocast(settings, real.device):
            penalty = gradient_penalty(state.critic, real, fake, epsilon)
        (settings.gp_weight * penalty).backward()
        scalars["critic/gradient_penalty"] = penalty.detach()
    with autocast(settings, real.device):
        loss = critic_loss(state.critic(real), state.critic(fake))
    loss.backward()
    norm = finish_update(state.optim_d)
    if settings.loss == "wgan":
        clip_weights(state.critic, settings.clip_value)
    scalars["loss/critic"] = (loss + settings.gp_weight * penalty).detach()
    return scalars | {"critic/wasserstein": -loss.detach(), "critic/gradient_norm": norm}


def projected_step(name, critic, optimizer, settings, real, fake):
    """Update the heads of a projected critic once. real, fake: (B, 3, S, S), the second may have a graph.

    Returns its scalars, the generator's loss, and the features of real and fake, the second with their graph.
    """
    # autocast keeps what it has cast, with or without a graph, until its block ends; so each has one of its own.
    with autocast(settings, real.device), torch.no_grad():
        real = critic.features(real)
    with autocast(settings, fake.device):
        fake = critic.features(fake)
    with autocast(settings, fake[0].device):
        loss = critic_loss(critic.heads(real), critic.heads([feature.detach() for feature in fake]))
    loss.backward()
    scalars = {f"{name}/wasserstein": -loss.detach(), f"{name}/gradient_norm": finish_update(optimizer)}
    with autocast(settings, fake[0].device):
        return scalars, generator_loss(critic.heads(fake)), real, fake


def frechet_step(state, settings, real, images, identities):
    """Take a batch, (B, 3, S, S) each, into the moments of the Frechet loss. Returns its scalars and its losses.

    identities: {name: (B, 128)} of the images and of the real ones, or two empty dicts.
    """
    frechet = state.frechet
    with autocast(settings, real.device), torch.no_grad():
        real = frechet.features(real) | identities[1]
    with autocast(settings, images.device):
        fake = frechet.features(images) | identities[0]
    if state.step % FRECHET_EVERY == 0:
        frechet.refresh()
    losses = frechet(fake)
    whole = ({name: gather_batch(x, settings.batch_size) for name, x in batch.items()} for batch in (fake, real))
    frechet.remember(*whole)
    return {f"frechet/{name}": frechet.moments[name].distance.clone() for name in fake}, losses


def shares_of(state, settings):
    """Return the shares of pixel, projected and identity critic and Frechet loss in the generator's gradient."""
    projected = settings.projected_share if state.critic and state.projected else float(state.critic is None)
    rest = 1 - settings.identity_share - settings.frechet_share
    return rest * (1 - projected), rest * projected, settings.identity_share, settings.frechet_share


def generator_step(state, settings, fake, images, losses):
    """Update the generator once, along the gradients of the critics' losses at its images.

    fake: (B, 3, S, S) with the generator's graph.  images: the same numbers, where the graphs of the losses end.
    losses: [(loss, share)]. All gradients are brought to the same norm, that of the first, and mixed by their shares.
    Without a graph, as before --warmup-steps, nothing is updated.
    """
    if not fake.requires_grad:
        return {"loss/generator": losses[0][0].detach(), "generator/gradient_norm": losses[0][0].new_zeros(())}
    # The losses share the graph of the augmented images; no gradient of a critic's weight is computed.
    gradients = [torch.autograd.grad(loss, images, retain_graph=loss is not losses[-1][0])[0] for loss, _ in losses]
    norms = [mean_over_ranks(gradient.float().square().sum()).sqrt() for gradient in gradients]
    factors = [share * norms[0] / norm.clamp_min(1e-30) for norm, (_, share) in zip(norms, losses, strict=True)]
    fake.backward(sum(gradient * factor for gradient, factor in zip(gradients, factors, strict=True)))
    return {"loss/generator": losses[0][0].detach(), "generator/gradient_norm": finish_update(state.optim_g)}


def finish_update(optimizer):
    """Step along the gradients, averaged over the ranks, and free them. Returns their L2 norm, a scalar."""
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    average_over_ranks(gradients)
    norm = torch.nn.utils.get_total_norm(gradients)
    optimizer.step()
    optimizer.zero_grad()  # now, not before the next one: they would lie about while the other network learns
    return norm


def autocast(settings, device):
    return torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16")


@torch.no_grad()
def update_ema(ema, network, decay):
    """ema = decay * ema + (1 - decay) * network, for weights and BatchNorm's statistics; counters are copied."""
    ours, theirs = list(ema.state_dict().values()), list(network.state_dict().values())
    average = torch.optim.swa_utils.get_ema_multi_avg_fn(decay)
    average([t for t in ours if t.is_floating_point()], [t for t in theirs if t.is_floating_point()], None)
    for counter, other in zip(ours, theirs, strict=True):
        if not counter.is_floating_point():
            counter.copy_(other)


def set_fade(state, settings):
    """Set how far a grown network's newest block has faded in: 0 at the first step, 1 after --fade-steps."""
    fade = min(1.0, state.step / settings.fade_steps) if settings.fade_steps else 1.0
    for network in (state.generator, state.critic, state.ema):
        if network is not None and network.fade is not None:
            network.fade.fill_(fade)


def train_step(state, settings, dataset, device):
    """Do one step. Returns (scalars by their names in TensorBoard, real, fake), the images (B, 3, S, S) in [-1, 1].

    Under torchrun a rank does its share of the batch, and what it returns is about that share alone.
    """
    share = share_of_batch(settings.batch_size)
    noise = draw_noise(settings, state.step)  # of the whole batch, so that it is the same on any number of ranks
    noise = {name: values[:, share].to(device, non_blocking=True) for name, values in noise.items()}
    set_fade(state, settings)

    def generate(z):
        with autocast(settings, device):
            return state.generator(z)  # (B, 3, S, S)

    scalars = {}
    for i in batches_of(state, settings):
        start = (state.step * settings.n_critic + i) * settings.batch_size
        indices = batch_indices(len(dataset), settings.seed, start, settings.batch_size)
        real = dataset.batch(indices[share], device)  # (B, 3, S, S)
        real = torch.where(noise["flip"][i], real.flip(3), real)
        seen_real = augment(real, settings.augment, noise["augment"][i][:, 1])
        if state.critic:
            with torch.no_grad():
                seen = augment(generate(noise["z"][i]), settings.augment, noise["augment"][i][:, 0])
            scalars = critic_step(state, settings, seen_real, seen, noise["epsilon"][i])

    learns = state.step >= settings.warmup_steps
    with torch.set_grad_enabled(learns):
        # New images: on those that the pixel critic has just learnt on, faces came out alike.
        fake = generate(noise["z"][-1])
    images = fake.detach().requires_grad_(learns)  # where the graphs of the critics' losses end
    seen = augment(images, settings.augment, noise["augment"][-1][:, 0])
    losses, (pixel_share, projected_share, identity_share, frechet_share) = [], shares_of(state, settings)
    if state.critic:
        with autocast(settings, device):
            losses.append((generator_loss(state.critic(seen)), pixel_share))
    if state.projected:
        more, loss, *_ = projected_step("projected", state.projected, state.optim_p, settings, seen_real, seen)
        scalars |= more
        losses.append((loss, projected_share))
    seen_identities = {}, {}
    if state.identity:  # sees the images as they are, since faces must be where it expects them
        step = projected_step("identity", state.identity, state.optim_i, settings, real, images)
        more, loss, (*_, real_identities), (*_, identities) = step
        scalars |= more
        losses += [(loss, identity_share / 2), (state.identity.distance(identities), identity_share / 2)]
        state.identity.remember(*(gather_batch(x, settings.batch_size) for x in (identities, real_identities)))
        seen_identities = {"identities": identities}, {"identities": real_identities}
    if state.frechet:
        more, distances = frechet_step(state, settings, real, images, seen_identities)
        scalars |= more
        losses += [(loss, frechet_share / len(distances)) for loss in distances]
    scalars |= generator_step(state, settings, fake, images, losses)
    if state.ema:
        # Early on the average follows faster, or it would show the random start, of a grown network that of its new
        # blocks, for 1 / (1 - ema) steps. A network that was taken over whole brings its average along.
        early = 1 if settings.start_from else (1 + state.step) / (10 + state.step)
        update_ema(state.ema, state.generator, min(settings.ema, early))
    state.step += 1
    return scalars, real, images.detach()
