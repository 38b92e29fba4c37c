"""Defects in the networks of linen, NNX and PyTorch."""

from functools import partial

from parity_tests.mutants.mutant import Mutant

ARCHITECTURE, LINEN, NNX = (
    f"bcn_flax/models/{name}.py" for name in ("architecture", "linen", "nnx")
)
TORCH = "bcn_torch/vgg.py"

in_resnet = partial(
    Mutant,
    file=LINEN,
    hint="test_it_equals_a_plain_implementation",
    tests=("test_resnet.py",),
)
in_vgg = partial(
    Mutant,
    file=LINEN,
    hint="test_the_vgg_equals_a_plain_implementation",
    tests=("test_resnet.py",),
)
in_nnx = partial(
    Mutant,
    file=NNX,
    hint="test_in_nnx_it_has_the_same_parameters_and_logits",
    tests=("test_resnet.py",),
)
in_torch = partial(
    Mutant,
    file=TORCH,
    hint="test_it_equals_a_plain_implementation",
    tests=("test_torch_vgg.py",),
)

MUTANTS = (
    in_resnet(
        file=ARCHITECTURE,
        name="first-stage-halved",
        old="2 if stage > 0 and i == 0 else 1",
        new="2 if i == 0 else 1",
        why="The first stage of a ResNet halves the image as well.",
        hint="test_the_stages_halve_the_image",
    ),
    in_resnet(
        file=ARCHITECTURE,
        name="every-block-halves",
        old="2 if stage > 0 and i == 0 else 1",
        new="2 if stage > 0 else 1",
        why="Deeper networks run out of pixels.",
        hint="test_only_the_first_block_of_a_stage_halves",
    ),
    in_resnet(
        file=ARCHITECTURE,
        name="shortcut-channels-before",
        old="(0, missing)",
        new="(missing, 0)",
        why="The channels of a shortcut move to the end.",
        hint="test_shortcuts_take_every_other_pixel",
    ),
    in_resnet(
        file=ARCHITECTURE,
        name="shortcut-channels-repeated",
        old="((0, 0), (0, 0), (0, 0), (0, missing)))",
        new='((0, 0), (0, 0), (0, 0), (0, missing)), mode="wrap")',
        why="A shortcut repeats its channels, where the published one adds zeros.",
        hint="test_shortcuts_take_every_other_pixel",
    ),
    in_vgg(
        file=ARCHITECTURE,
        name="average-pooled",
        old="nn.max_pool(x, (2, 2), (2, 2))",
        new="nn.avg_pool(x, (2, 2), (2, 2))",
        why="Blocks end in average pools.",
    ),
    in_vgg(
        file=ARCHITECTURE,
        name="leaky-relu",
        old="return nn.relu(x)",
        new="return nn.leaky_relu(x)",
        why="A hundredth of what is negative passes.",
    ),
    in_resnet(
        file=ARCHITECTURE,
        name="depth-of-6n-plus-3",
        old="divmod(depth - 2, 6)",
        new="divmod(depth - 3, 6)",
        why="The depth counts a layer that has no weights.",
        hint="test_the_depth_counts_the_layers_with_weights",
    ),
    in_resnet(
        name="norm-told-the-contrary",
        old="use_running_average=not train)",
        new="use_running_average=train)",
        why="Norms by the batch in evaluation, by the running averages in training.",
    ),
    in_resnet(
        name="norms-always-train",
        old="use_running_average=not train)",
        new="use_running_average=False)",
        why="Norms train in evaluation, too.",
    ),
    in_resnet(
        name="bias-beside-a-norm",
        old="use_bias=self.norm is None,",
        new="use_bias=True,",
        why="Convolutions before a norm have a bias without effect.",
        hint="test_convolutions_have_a_bias_only_without_a_norm",
    ),
    in_resnet(
        name="kernels-of-lecun",
        old="            kernel_init=nn.initializers.he_normal(),\n",
        new="",
        why="Kernels start with half of the variance.",
        hint="test_kernels_start_as_he_et_al_say",
    ),
    in_resnet(
        name="relu-after-both-norms",
        old="        y = _call(self.norms[1], self.convs[1](y), train)\n",
        new="        y = relu(_call(self.norms[1], self.convs[1](y), train))\n",
        why="A residual branch can only add.",
    ),
    in_resnet(
        name="no-relu-after-the-sum",
        old="return relu(shortcut(x, self.features, self.stride) + y)",
        new="return shortcut(x, self.features, self.stride) + y",
        why="The output of a block has no activation.",
    ),
    in_resnet(
        name="one-norm-for-both",
        old="_call(self.norms[1], self.convs[1](y), train)",
        new="_call(self.norms[0], self.convs[1](y), train)",
        why="Both convolutions of a block share a norm.",
    ),
    in_resnet(
        name="stride-of-the-second",
        old="for s in (self.stride, 1)]",
        new="for s in (1, self.stride)]",
        why="The second convolution of a block halves the image.",
    ),
    in_resnet(
        name="no-first-relu",
        old="x = relu(_call(self.first_norm, self.first_conv(x), train))",
        new="x = _call(self.first_norm, self.first_conv(x), train)",
        why="The first layer has no activation.",
    ),
    in_resnet(
        name="groups-of-the-vgg",
        old="norm: Make | None = partial(BatchChannelNorm, num_groups=8)",
        new="norm: Make | None = partial(BatchChannelNorm, num_groups=16)",
        why="In groups of one channel the channel norm undoes the batch norm.",
        hint="test_every_group_of_the_default_has_several_channels",
    ),
    in_vgg(
        name="norm-after-relu",
        old="                if self.norm is not None:\n"
        "                    layers.append(self.norm(**dtypes))\n"
        "                layers.append(relu)\n",
        new="                layers.append(relu)\n"
        "                if self.norm is not None:\n"
        "                    layers.append(self.norm(**dtypes))\n",
        why="The norm comes after the activation.",
    ),
    in_vgg(
        name="pool-after-each-convolution",
        old="                layers.append(relu)\n            layers.append(max_pool)",
        new="                layers.append(relu)\n                layers.append(max_pool)",
        why="Every convolution halves the image, not every block.",
    ),
    in_vgg(
        name="padding-of-ones",
        old='"padding": 1,',
        new='"padding": "CIRCULAR",',
        why="Images are padded by their other side.",
    ),
    in_vgg(
        name="vgg-without-dtype",
        old='dtypes: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}\n'
        "        conv = partial(self.conv, **_CONV_3X3, **dtypes)",
        new='dtypes: dict[str, Any] = {"param_dtype": self.param_dtype}\n'
        "        conv = partial(self.conv, **_CONV_3X3, **dtypes)",
        why="The computation of a VGG is in float32, whatever is asked for.",
        hint="test_the_given_classes_are_used_in_every_layer",
    ),
    in_nnx(
        name="nnx-groups-of-4",
        old="_EIGHT_GROUPS = partial(BatchChannelNorm, num_groups=8)",
        new="_EIGHT_GROUPS = partial(BatchChannelNorm, num_groups=4)",
        why="The default of NNX is another network than that of linen.",
    ),
    in_nnx(
        name="nnx-bias-beside-a-norm",
        old="use_bias=norm is None,",
        new="use_bias=True,",
        why="NNX has parameters that linen has not.",
    ),
    in_nnx(
        name="nnx-kernels-of-lecun",
        old="            kernel_init=nnx.initializers.he_normal(),\n",
        new="",
        why="Kernels start with half of the variance.",
        hint="test_kernels_start_as_he_et_al_say",
    ),
    in_nnx(
        name="nnx-stride-of-the-second",
        old="first = conv(in_features, features, strides=stride)\n"
        "        self.convs = nnx.List([first, conv(features, features)])",
        new="first = conv(in_features, features)\n"
        "        self.convs = nnx.List([first, conv(features, features, strides=stride)])",
        why="The second convolution of a block halves the image.",
    ),
    in_nnx(
        name="nnx-relu-after-both-norms",
        old="y = self.norms[1](self.convs[1](y))",
        new="y = relu(self.norms[1](self.convs[1](y)))",
        why="A residual branch can only add.",
    ),
    in_nnx(
        name="nnx-no-first-relu",
        old="x = relu(self.first_norm(self.first_conv(x)))",
        new="x = self.first_norm(self.first_conv(x))",
        why="The first layer has no activation.",
    ),
    in_nnx(
        name="nnx-norm-after-relu",
        old="                if norm is not None:\n"
        "                    layers.append(norm(features, **shared))\n"
        "                layers.append(relu)\n",
        new="                layers.append(relu)\n"
        "                if norm is not None:\n"
        "                    layers.append(norm(features, **shared))\n",
        why="The norm of a VGG comes after the activation.",
        hint="test_the_vgg_equals_a_plain_implementation",
    ),
    in_torch(
        name="torch-average-pooled",
        old="nn.MaxPool2d(2, 2)",
        new="nn.AvgPool2d(2, 2)",
        why="Blocks end in average pools.",
    ),
    in_torch(
        name="torch-circular-padding",
        old="kernel_size=3, padding=1)",
        new='kernel_size=3, padding=1, padding_mode="circular")',
        why="Images are padded by their other side.",
    ),
    in_torch(
        name="torch-largest-pixel",
        old="self.layers(x).mean((2, 3))",
        new="self.layers(x).amax((2, 3))",
        why="The largest of the remaining pixels is taken, not their mean.",
        hint="test_the_output_is_the_linear_map_of_the_mean",
    ),
    in_torch(
        name="torch-first-pixel",
        old="self.layers(x).mean((2, 3))",
        new="self.layers(x)[:, :, 0, 0]",
        why="At the size of CIFAR it is the same; other sizes lose pixels.",
        hint="test_the_output_is_the_linear_map_of_the_mean",
    ),
    in_torch(
        name="torch-leaky-relu",
        old="layers.append(nn.ReLU())",
        new="layers.append(nn.LeakyReLU())",
        why="A hundredth of what is negative passes.",
    ),
    in_torch(
        name="torch-groups-of-16",
        old="NORM = partial(BatchChannelNorm, groups=32)",
        new="NORM = partial(BatchChannelNorm, groups=16)",
        why="Checkpoints of the annotated implementation do not load.",
        hint="test_by_default_it_loads_a_checkpoint",
    ),
    in_torch(
        name="torch-without-biases",
        old="kernel_size=3, padding=1)",
        new="kernel_size=3, padding=1, bias=False)",
        why="Checkpoints of the annotated implementation do not load.",
        hint="test_by_default_it_loads_a_checkpoint",
    ),
    in_torch(
        name="torch-norm-after-relu",
        old="                if norm is not None:\n"
        "                    layers.append(norm(channels))\n"
        "                layers.append(nn.ReLU())\n",
        new="                layers.append(nn.ReLU())\n"
        "                if norm is not None:\n"
        "                    layers.append(norm(channels))\n",
        why="The norm comes after the activation.",
        hint="test_each_norm_and_kind_of_convolution_is_where_it_should_be",
    ),
)
