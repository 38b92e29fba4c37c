"""Defects in the training script and in what it stands on."""

from functools import partial

from parity_tests.mutants.mutant import Mutant

SCRIPT = "train_cifar.py"
CHECKPOINTS, CIFAR, CONFIG, DATA, DEVICES, PROGRESS, RESULTS = (
    f"training/{name}.py"
    for name in ("checkpoints", "cifar", "config", "data", "devices", "progress", "results")
)

# A step of training against its restatement in NumPy.
in_step = partial(
    Mutant,
    file=SCRIPT,
    hint="test_training_is_what_the_help_says",
    tests=("test_training_step.py",),
)
# A network as the help describes it.
in_network = partial(
    Mutant,
    file=SCRIPT,
    hint="test_the_network_has_the_layers_asked_for",
    tests=("test_training_script.py",),
)
in_run = partial(Mutant, file=SCRIPT, tests=("test_training_script.py",))
in_resume = partial(Mutant, file=SCRIPT, tests=("test_training_resume.py",))
in_settings = partial(Mutant, file=CONFIG, tests=("test_training_settings.py",))
in_config = partial(Mutant, file=CONFIG, tests=("test_training_config.py",))
in_data = partial(Mutant, file=DATA, tests=("test_training_data.py",))
in_devices = partial(Mutant, file=DEVICES, tests=("test_training_devices.py",))
in_results = partial(Mutant, file=RESULTS, tests=("test_training_results.py",))
in_checkpoints = partial(Mutant, file=CHECKPOINTS, tests=("test_training_checkpoints.py",))
in_cifar = partial(Mutant, file=CIFAR, tests=("test_training_data.py", "test_training_cifar.py"))

ADAM = "optax.chain(clip, optax.scale_by_adam(), decay, optax.scale_by_learning_rate(rate))"
SGD = "optax.chain(clip, decay, optax.sgd(rate, 0.9, nesterov=True))"

STEPS = (
    in_step(
        name="l2-inside-adam",
        old=ADAM,
        new="optax.chain(clip, decay, optax.scale_by_adam(), optax.scale_by_learning_rate(rate))",
        why="Weight decay enters the moments of Adam: L2 in the place of AdamW.",
    ),
    in_step(
        name="clipping-after-adam",
        old=ADAM,
        new="optax.chain(optax.scale_by_adam(), clip, decay, optax.scale_by_learning_rate(rate))",
        why="The direction of Adam is clipped, not the gradient.",
    ),
    in_step(
        name="decay-without-the-learning-rate",
        old=ADAM,
        new="optax.chain(clip, optax.scale_by_adam(), optax.scale_by_learning_rate(rate), decay)",
        why="Weights grow by the decay in each step.",
    ),
    in_step(
        name="decay-after-momentum",
        old=SGD,
        new="optax.chain(clip, optax.trace(0.9, True), decay, optax.scale_by_learning_rate(rate))",
        why="Decoupled weight decay with SGD, where the help says L2.",
    ),
    in_step(
        name="decay-clipped-with-the-gradient",
        old=SGD,
        new="optax.chain(decay, clip, optax.sgd(rate, 0.9, nesterov=True))",
        why="The norm that is clipped includes the decay.",
    ),
    in_step(
        name="momentum-without-nesterov",
        old="0.9, nesterov=True",
        new="0.9",
        why="Plain momentum.",
    ),
    in_step(
        name="biases-decay",
        old="p.ndim > 1",
        new="p.ndim > 0",
        why="Scales and biases decay as well.",
    ),
    in_step(
        name="convolutions-do-not-decay",
        old="p.ndim > 1",
        new="p.ndim == 2",
        why="Only kernels of dense layers decay.",
    ),
    in_step(
        name="smoothing-dropped-by-the-step",
        old="cross_entropy(logits, labels, config.label_smoothing)",
        new="cross_entropy(logits, labels)",
        why="The option has no effect.",
    ),
    in_step(
        name="smoothing-in-evaluation",
        old="return add(no_totals(), cross_entropy(logits, labels), logits, labels)",
        new="return add(no_totals(), cross_entropy(logits, labels, 0.1), logits, labels)",
        why="The held-out loss is of smoothed labels.",
    ),
    in_step(
        name="schedule-in-micro-batches",
        old="recipe.epochs * self.steps // recipe.micro_batches",
        new="recipe.epochs * self.steps",
        why="The schedule is as long as the number of micro-batches, so it never ends.",
    ),
    in_step(
        name="schedule-of-one-epoch",
        old="batches = recipe.epochs * self.steps // recipe.micro_batches",
        new="batches = self.steps // recipe.micro_batches",
        why="The schedule ends with the first epoch.",
    ),
    in_step(
        name="schedule-drops-early",
        old="steps * 3 // 4: 0.1",
        new="steps * 5 // 8: 0.1",
        why="The second drop comes after five eighths of the steps.",
    ),
    in_step(
        name="cosine-above-zero",
        old="optax.cosine_decay_schedule(recipe.learning_rate, steps)",
        new="optax.cosine_decay_schedule(recipe.learning_rate, steps, 0.05)",
        why="The learning rate does not fall to 0.",
    ),
    in_step(
        name="micro-batches-summed",
        old="optax.MultiSteps(chain, recipe.micro_batches)",
        new="optax.MultiSteps(chain, recipe.micro_batches, use_grad_mean=False)",
        why="The gradients of the micro-batches are added up, not averaged.",
    ),
    in_step(
        name="micro-batches-clipped-one-by-one",
        old="return optax.MultiSteps(chain, recipe.micro_batches).gradient_transformation()",
        new="every = optax.MultiSteps(chain, recipe.micro_batches).gradient_transformation()\n"
        "    return optax.chain(clip, every)",
        why="The gradient of each micro-batch is clipped, not only their average.",
    ),
    in_step(
        name="augmentation-key-reused",
        old="state.step + 1, key, state.order, totals)",
        new="state.step + 1, state.key, state.order, totals)",
        why="Every step of an epoch shifts its images in the same way.",
    ),
    in_step(
        name="mirroring-the-wrong-data-set",
        old="if recipe.flip:",
        new="if not recipe.flip:",
        why="Digits are mirrored, photographs are not.",
    ),
    in_step(
        name="shift-of-one-pixel",
        old="data.random_shift(shift_key, images, recipe.shift)",
        new="data.random_shift(shift_key, images, recipe.shift + 1)",
        why="Images are shifted by more pixels than the recipe says.",
    ),
    in_step(
        name="order-of-every-epoch-alike",
        old="jax.random.permutation(order_key, len(state.order))",
        new="jax.random.permutation(jax.random.key(0), len(state.order))",
        why="Every epoch takes the images in the same order.",
    ),
    in_step(
        name="batches-overlap",
        old="start = state.step % recipe.steps(len(state.order)) * recipe.micro_batch",
        new="start = state.step % recipe.steps(len(state.order))",
        why="The batches of an epoch overlap.",
    ),
    in_step(
        name="labels-not-shuffled",
        old="labels = split(train.labels[batch])",
        new="labels = split(lax.dynamic_slice(train.labels, (start,), (recipe.micro_batch,)))",
        why="Images are shuffled, their labels are not.",
    ),
    in_step(
        name="totals-of-the-last-batch",
        old="totals = add(state.totals, losses, logits, labels)",
        new="totals = add(no_totals(), losses, logits, labels)",
        why="The training loss is that of the last batch.",
    ),
    in_step(
        name="totals-of-all-epochs",
        old="key=key, order=order, totals=no_totals())",
        new="key=key, order=order)",
        why="The training loss is the mean over all epochs so far.",
    ),
    in_step(
        name="padding-counted",
        old="totals.images + jnp.sum(real, dtype=jnp.int32)",
        new="totals.images + len(labels)",
        why="The accuracy is of the held-out images and of the padding.",
    ),
    in_step(
        name="optimizer-state-forgotten",
        old="State(params, batch_stats, opt_state, state.step + 1",
        new="State(params, batch_stats, state.opt_state, state.step + 1",
        why="Every step is the first one of the optimizer.",
    ),
    in_step(
        name="statistics-forgotten",
        old="State(params, batch_stats, opt_state, state.step + 1",
        new="State(params, state.batch_stats, opt_state, state.step + 1",
        why="The running averages never change.",
    ),
    in_step(
        name="loss-summed",
        old="losses.mean(), (losses, logits,",
        new="losses.sum(), (losses, logits,",
        why="The gradient is of the sum over the batch.",
    ),
    in_step(
        name="training-in-evaluation-mode",
        old="                train=True,\n",
        new="                train=False,\n",
        why="Training normalizes by the running averages and does not update them.",
    ),
    in_step(
        name="evaluation-in-training-mode",
        old="model.apply(variables, data.to_float(split(images)), train=False)",
        new="model.apply(\n            variables, data.to_float(split(images)), train=True,"
        ' mutable=["batch_stats"]\n        )[0]',
        why="Held-out images are normalized by their own batch.",
    ),
    in_step(
        name="best-by-training-accuracy",
        old="score=test_accuracy)",
        new="score=train_accuracy)",
        why="The best checkpoint is that of the best training accuracy.",
    ),
    in_step(
        name="speed-in-batches",
        old="images = (epoch * self.steps - first) * self.recipe.micro_batch",
        new="images = (epoch * self.steps - first) * self.recipe.batch_size",
        why="With micro-batches, images are counted several times.",
    ),
)

RUNS = (
    in_run(
        name="seed-ignored",
        old="jax.random.split(jax.random.key(seed))",
        new="jax.random.split(jax.random.key(0))",
        why="Every seed gives the same run.",
        hint="test_the_seed_decides_every_bit_of_the_state",
    ),
    in_run(
        name="weights-not-checked",
        old="values = (state.totals.loss, *jax.tree.leaves(state.params))",
        new="values = (state.totals.loss,)",
        why="Weights that are not finite are saved if the loss still is.",
        hint="test_what_is_not_finite",
    ),
    in_run(
        name="loss-not-checked",
        old="values = (state.totals.loss, *jax.tree.leaves(state.params))",
        new="values = (*jax.tree.leaves(state.params),)",
        why="Training goes on after a loss that is not finite.",
        hint="test_what_is_not_finite",
    ),
    in_run(
        name="checkpoints-counted-from-the-epoch",
        old="done % self.config.checkpoint_every == 0",
        new="(done - first) % self.config.checkpoint_every == 0",
        why="The number of steps between checkpoints starts again in each epoch.",
        hint="test_checkpoints_are_saved_after_so_many_steps",
    ),
    in_run(
        name="no-tensorboard",
        old="tensorboard=config.tensorboard",
        new="tensorboard=False",
        why="The option has no effect.",
        hint="test_cifar10_from_end_to_end",
    ),
    in_network(
        name="weights-always-standardized",
        old="WSConv if config.ws else nn.Conv",
        new="WSConv",
        why="--no-ws has no effect.",
    ),
    in_network(
        name="batch-norm-without-its-momentum",
        old='"bn": partial(BatchNorm, momentum=momentum)',
        new='"bn": BatchNorm',
        why="The running averages of batch norm do not follow the batch size.",
    ),
    in_network(
        name="batch-norm-with-another-variance",
        old='"bn": partial(BatchNorm, momentum=momentum)',
        new='"bn": partial(BatchNorm, momentum=momentum, running_variance="unbiased")',
        why="The running variance of batch norm is not the one of BCN.",
    ),
    in_network(
        name="estimate-ignored",
        old="estimate=config.estimate, ",
        new="",
        why="--no-estimate has no effect.",
    ),
    in_network(
        name="group-norm-with-flaxs-epsilon",
        old="num_groups=groups, epsilon=1e-5)",
        new="num_groups=groups)",
        why="Group norm has an epsilon of its own.",
    ),
    in_network(
        name="depth-ignored",
        old="ResNet(config.depth, **shared)",
        new="ResNet(**shared)",
        why="Every ResNet has 20 layers.",
    ),
    in_network(
        name="dtype-ignored",
        old='        "dtype": jnp.dtype(config.dtype),\n',
        new="",
        why="The computation is always in float32.",
    ),
    in_devices(
        file=SCRIPT,
        name="process-numbers-swapped",
        old="config.coordinator, config.num_processes, config.process_id",
        new="config.coordinator, config.process_id, config.num_processes",
        why="No run of several processes starts.",
        hint="test_each_process_is_told_where_it_belongs",
    ),
    in_resume(
        name="best-is-the-last",
        old='("last", checkpoints.latest), ("best", checkpoints.best)',
        new='("best", checkpoints.best), ("last", checkpoints.latest)',
        why="The metrics returned are those of the last checkpoint.",
        hint="test_the_last_and_the_best_checkpoint_are_evaluated",
    ),
    in_resume(
        name="pictures-by-the-last-checkpoint",
        old="best = checkpoints.best(like) or checkpoints.latest(like)",
        new="best = checkpoints.latest(like)",
        why="A picture is classified by the last checkpoint, not by the best.",
        hint="test_a_picture_is_classified_as_in_training",
    ),
    in_resume(
        name="evaluation-with-other-settings",
        old="folder, config, _ = results.read_run(config)\n    recipe, dataset",
        new="folder, _, _ = results.read_run(config)\n    recipe, dataset",
        why="A run is evaluated with the network of the command line.",
        hint="test_the_last_and_the_best_checkpoint_are_evaluated",
    ),
    in_resume(
        name="saved-before-the-next-order",
        old="            state = self.begin_epoch(state)\n"
        "            self._save(checkpoints, state, results, score=test_accuracy)",
        new="            self._save(checkpoints, state, results, score=test_accuracy)\n"
        "            state = self.begin_epoch(state)",
        why="A run resumed between two epochs repeats the order of the first.",
        hint="test_a_run_stopped_at_any_step_is_resumed_bit_for_bit",
    ),
    in_resume(
        name="history-without-its-last-epoch",
        old='{"history": results.history}',
        new='{"history": results.history[:-1]}',
        why="A resumed run trains an epoch once more.",
        hint="test_a_run_stopped_at_any_step_is_resumed_bit_for_bit",
    ),
    in_resume(
        name="epoch-started-again",
        old="range(first + 1, epoch * self.steps + 1)",
        new="range((epoch - 1) * self.steps + 1, epoch * self.steps + 1)",
        why="A run resumed within an epoch trains too many steps.",
        hint="test_a_run_stopped_at_any_step_is_resumed_bit_for_bit",
    ),
    in_resume(
        name="signal-without-a-save",
        old="if signals.noted or done % self.config.checkpoint_every == 0:",
        new="if done % self.config.checkpoint_every == 0:",
        why="What was trained since the last checkpoint is lost.",
        hint="test_a_run_stopped_at_any_step_is_resumed_bit_for_bit",
    ),
)

SETTINGS = (
    in_settings(
        name="resumed-with-another-decay",
        old='    "tensorboard": "it only adds files",\n',
        new='    "tensorboard": "it only adds files",\n    "weight_decay": "nobody knows",\n',
        why="A changed weight decay is ignored when a run is resumed.",
        hint="test_a_changed_option_is_refused_unless_it_is_free",
    ),
    in_settings(
        file=RESULTS,
        name="new-settings-ignored",
        old="sorted((old.keys() | settings.keys()) - FREE.keys())",
        new="sorted((old.keys() & settings.keys()) - FREE.keys())",
        why="A setting that the run did not have yet is ignored.",
        hint="test_a_setting_that_the_run_did_not_have",
    ),
    in_settings(
        name="settings-of-the-run-with-its-folders",
        old="get_type_hints(Config).items() if name not in FREE}",
        new="get_type_hints(Config).items() if name in run}",
        why="An earlier run decides where the data are now.",
        hint="test_the_settings_of_a_run_but_those_that_are_free",
    ),
    in_settings(
        file=RESULTS,
        name="first-folder-resumed",
        old="return made[-1] if made",
        new="return made[0] if made",
        why="The first run of these settings is resumed, not the last.",
        hint="test_the_last_of_several_runs_is_resumed",
    ),
    in_config(
        name="rate-by-micro-batch",
        old="ratio = batch_size / recipe.batch_size",
        new="ratio = micro_batch / recipe.batch_size",
        why="The learning rate of Adam follows the micro-batch.",
        hint="test_averages_look_as_far_back_with_micro_batches",
    ),
    in_config(
        name="rate-of-sgd-by-data-set",
        old="0.05 / 32 * batch_size",
        new="0.05 * ratio",
        why="The learning rate of SGD for CIFAR is half of what the help says.",
        hint="test_help_says_the_defaults_of_each_data_set",
    ),
    in_config(
        name="averages-by-batch",
        old="recipe.norm_momentum ** (micro_batch / recipe.micro_batch)",
        new="recipe.norm_momentum ** (batch_size / recipe.batch_size)",
        why="With micro-batches, the running averages forget too fast.",
        hint="test_averages_look_as_far_back_with_micro_batches",
    ),
    in_config(
        name="zero-is-the-default",
        old="(value := getattr(config, name)) is not None}",
        new="(value := getattr(config, name))}",
        why="A momentum of 0 is taken for none given.",
        hint="test_the_command_line_wins",
    ),
    in_config(
        name="last-batch-incomplete",
        old="return images // self.batch_size * self.micro_batches",
        new="return images // self.micro_batch",
        why="Micro-batches that do not make a batch are trained on as well.",
        hint="test_averages_look_as_far_back_with_micro_batches",
    ),
    in_config(
        file=DEVICES,
        name="devices-not-checked",
        old="if micro_batch % count:",
        new="if micro_batch < count:",
        why="A micro-batch that cannot be shared equally fails in the compiler.",
        hint="test_bad_values",
    ),
)

DATA_SETS = (
    in_data(
        name="shift-never-the-last",
        old="0, 2 * pixels + 1)",
        new="0, 2 * pixels)",
        why="Images are never shifted by the full range to one side.",
        hint="test_a_shifted_image_is_a_window_of_the_padded_one",
    ),
    in_data(
        name="shift-along-the-diagonal",
        old="jax.random.randint(key, (n, 2), 0",
        new="jnp.ones((1, 2), int) * jax.random.randint(key, (n, 1), 0",
        why="Both axes are shifted alike.",
        hint="test_a_shifted_image_is_a_window_of_the_padded_one",
    ),
    in_data(
        name="one-coin-for-all",
        old="0.5, (images.shape[0], 1, 1, 1))",
        new="0.5, (1, 1, 1, 1))",
        why="All images of a batch are mirrored, or none.",
        hint="test_half_of_the_images_are_mirrored",
    ),
    in_data(
        name="upside-down",
        old="images[:, :, ::-1]",
        new="images[:, ::-1]",
        why="Images are mirrored top to bottom.",
        hint="test_half_of_the_images_are_mirrored",
    ),
    in_data(
        name="padding-of-class-0",
        old="constant_values=-1",
        new="constant_values=0",
        why="Padding counts as images of class 0.",
        hint="test_padding_has_class_minus_1",
    ),
    in_data(
        name="pictures-turned",
        old="resize((width, height)",
        new="resize((height, width)",
        why="Pictures that are not square are read as noise.",
        hint="test_a_picture_that_is_not_square",
    ),
    in_cifar(
        name="coarse-labels",
        old="table[:, source.label_bytes - 1].astype(np.int32)",
        new="table[:, 0].astype(np.int32)",
        why="CIFAR-100 has the 20 coarse labels.",
        hint="test_cifar_is_read_image_by_image",
    ),
    in_cifar(
        name="images-turned",
        old="transpose(0, 2, 3, 1)",
        new="transpose(0, 3, 2, 1)",
        why="Rows and columns of CIFAR are exchanged.",
        hint="test_cifar_is_read_image_by_image",
    ),
    in_cifar(
        name="labels-not-checked",
        old="np.flatnonzero(labels >= source.classes)",
        new="np.flatnonzero(labels > source.classes)",
        why="A damaged label passes for a class.",
        hint="test_damaged_files_are_refused",
    ),
    in_devices(
        name="batches-not-split",
        old='self._split = NamedSharding(mesh, PartitionSpec("data"))',
        new="self._split = NamedSharding(mesh, PartitionSpec())",
        why="Every device computes the whole batch.",
        hint="test_each_device_has_an_equal_part_of_a_batch",
    ),
    in_resume(
        file=PROGRESS,
        name="second-signal-ignored",
        old="        self.noted = signal.Signals(number)\n        self._restore()\n",
        new="        self.noted = signal.Signals(number)\n",
        why="A program that hangs cannot be stopped by Ctrl-C.",
        hint="test_a_second_signal_takes_effect",
    ),
)

RESULT_FILES = (
    in_results(
        name="metrics-written-over",
        old='(self.folder / "metrics.jsonl").open("a")',
        new='(self.folder / "metrics.jsonl").open("w")',
        why="Only the metrics of the last epoch are kept.",
        hint="test_a_run_cut_short_keeps_its_metrics",
    ),
    in_devices(
        file=RESULTS,
        name="metrics-of-lost-epochs-kept",
        old='_replace(folder / "metrics.jsonl", "".join(map(_line, self.history)))',
        new='(folder / "metrics.jsonl").touch()',
        why="A resumed run keeps the metrics of epochs that it trains once more.",
        hint="test_a_run_is_resumed_on_other_devices",
    ),
    in_checkpoints(
        name="earliest-of-equal-scores",
        old="in sorted(scores, reverse=True)]",
        new="in sorted(scores, key=lambda pair: -pair[0])]",
        why="Of equal scores the first is the best.",
        hint="test_of_equal_scores_the_later_is_the_best",
    ),
    in_checkpoints(
        name="best-deleted",
        old="kept = {*sorted(self._records)[-_KEPT:], *_best_first(self._records)[:1]}",
        new="kept = {*sorted(self._records)[-_KEPT:]}",
        why="The best checkpoint is deleted when two newer ones are there.",
        hint="test_the_newest_two_and_the_best_are_kept",
    ),
    in_checkpoints(
        name="nan-is-the-best",
        old="score is None or math.isnan(score)",
        new="score is None",
        why="A score that is not a number hides the best.",
        hint="test_a_checkpoint_without_a_score_is_never_the_best",
    ),
    in_checkpoints(
        name="deleted-files-not-noticed",
        old="_sums(folder) ^ _saved_sums(folder)",
        new="_sums(folder) - _saved_sums(folder)",
        why="A checkpoint without one of its files counts as whole.",
        hint="test_damage_of_any_file_is_detected",
    ),
    in_checkpoints(
        name="record-not-checked",
        old="if _sum(folder, record) not in _saved_sums(folder):",
        new="if not record.exists():",
        why="A changed score or history is believed.",
        hint="test_a_changed_record_is_reported",
    ),
    in_checkpoints(
        name="numbers-used-again",
        old="default=-1)\n            on_first",
        new="default=-1) - len(damaged)\n            on_first",
        why="A new checkpoint takes the number of a damaged one.",
        hint="test_a_number_is_not_used_again",
    ),
    in_checkpoints(
        name="keys-of-the-default-kind",
        old="jax.random.wrap_key_data(placed, impl=_key_impl(like))",
        new="jax.random.wrap_key_data(placed)",
        why="Keys of another generator than the default do not come back.",
        hint="test_a_state_comes_back_bit_for_bit",
    ),
    in_checkpoints(
        name="shapes-not-compared",
        old="f\"{leaf.dtype}[{','.join(map(str, leaf.shape))}]\"",
        new='f"{leaf.dtype}[{leaf.ndim}]"',
        why="A state of other shapes is restored.",
        hint="test_a_checkpoint_of_another_state_is_no_damage",
    ),
)

MUTANTS = (*STEPS, *RUNS, *SETTINGS, *DATA_SETS, *RESULT_FILES)
