//! Loads a [`CausalLm`] from the tensors of a model folder and the pairs of an adapter.

use std::collections::BTreeSet;
use std::sync::{Arc, OnceLock};

use anyhow::Context as _;
use candle_core::{DType, Device, Tensor, Var};

use super::super::adapter::{Adapter, DELTA, LoraPair, Selection, TokenRows};
use super::arch::{Arch, Projection};
use super::linear::{Base, Linear, Lora, ReplacedRows, Weight};
use super::tensors::{
    EMBED_TOKENS, EMBEDDINGS, ENDS, HEAD, LM_HEAD, Module, NormKind, Role, SCORE, bias_name,
    layer_norms, module_path, modules, norm_path, norm_shape, projection_path, weight_name,
};
use super::{CausalLm, GateUp, Layer, Norm, Parameter, Qkv, Trained};
use crate::ml::io::float::Float;
use crate::ml::io::weights::Weights;
use crate::ml::quant::nf4::Nf4;

/// Reads a model's tensors, in the types and with the adapter's replacements that they need.
pub(super) struct Loader<'a> {
    arch: &'a Arch,
    weights: &'a Weights,
    adapter: Option<&'a Adapter>,
    trained: Trained,
    compute: DType,
    device: &'a Device,
    parameters: Vec<Parameter>,
    linears: u64,
    /// The adapter's modules and tensors that have been used.
    used: BTreeSet<String>,
}

/// A hint for a shape that differs in the size of the vocabulary.
fn resized(name: &str) -> &'static str {
    if [EMBEDDINGS, HEAD].contains(&name) {
        "; an adapter that was trained with other tokens needs the model whose embeddings were resized for them"
    } else {
        ""
    }
}

impl<'a> Loader<'a> {
    pub(super) fn new(
        arch: &'a Arch,
        weights: &'a Weights,
        adapter: Option<&'a Adapter>,
        trained: Trained,
        compute: DType,
        device: &'a Device,
    ) -> Self {
        Self {
            arch,
            weights,
            adapter,
            trained,
            compute,
            device,
            parameters: Vec::new(),
            linears: 0,
            used: BTreeSet::new(),
        }
    }

    /// Whether the adapter replaces the tensor called `name`.
    fn is_replaced(&self, name: &str) -> bool {
        self.adapter
            .is_some_and(|adapter| adapter.saved.contains_key(name) || adapter.trains(name))
    }

    /// A tensor of the base in its stored type. A 4-bit one is dequantised; it can't be trained or replaced.
    fn shaped(&self, name: &str, shape: &[usize]) -> anyhow::Result<Tensor> {
        let tensor = if let Some(nf4) = Nf4::load(self.weights, name)? {
            anyhow::ensure!(
                self.trained != Trained::Everything,
                "`{name}` is stored in 4 bits and can't be trained itself; give an adapter"
            );
            anyhow::ensure!(
                !self.is_replaced(name),
                "the adapter trains `{name}` whole, but it is stored in 4 bits; take the dense model"
            );
            nf4.to_tensor(nf4.dtype, self.device)?
        } else {
            self.weights.tensor(name, self.device)?
        };
        anyhow::ensure!(
            tensor.dims() == shape,
            "the tensor `{name}` has the shape {:?}, expected {shape:?} from config.json",
            tensor.dims()
        );
        Ok(tensor)
    }

    /// Makes a parameter of `tensor`; `role` is `None` for a tensor of the adapter.
    fn train(
        &mut self,
        name: String,
        tensor: &Tensor,
        role: Option<Role>,
    ) -> anyhow::Result<Weight> {
        let var = Var::from_tensor(&tensor.to_dtype(DType::F32)?.force_contiguous()?)?;
        self.parameters.push(Parameter {
            name,
            var: var.clone(),
            decays: role.is_none_or(Role::decays),
            adds_one: role.is_some_and(|role| self.adds_one(role)),
        });
        Ok(Weight::Trained(var))
    }

    /// Whether 1 is added to the stored tensors of a role.
    fn adds_one(&self, role: Role) -> bool {
        self.arch.norm_adds_one && matches!(role, Role::Norm(_))
    }

    /// A stored tensor as it is used.
    fn folded(&self, tensor: &Tensor, role: Role) -> anyhow::Result<Tensor> {
        if self.adds_one(role) {
            Ok((tensor.to_dtype(DType::F32)? + 1.)?)
        } else {
            Ok(tensor.clone())
        }
    }

    /// A weight of the base, or the adapter's tensor that replaces it; a frozen one is in `dtype`.
    fn weight(
        &mut self,
        name: &str,
        shape: &[usize],
        role: Role,
        dtype: DType,
    ) -> anyhow::Result<Weight> {
        let tensor = self.folded(&self.shaped(name, shape)?, role)?;
        self.effective(name, &tensor, role, dtype)
    }

    /// The weight called `name` for `tensor` of the base, with the adapter's replacement if there is one.
    fn effective(
        &mut self,
        name: &str,
        tensor: &Tensor,
        role: Role,
        dtype: DType,
    ) -> anyhow::Result<Weight> {
        if self.trained == Trained::Everything {
            return self.train(name.to_owned(), tensor, Some(role));
        }
        let Some(adapter) = self.adapter else {
            return Ok(Weight::Frozen(tensor.to_dtype(dtype)?));
        };
        let own = adapter.saved.get(name);
        if own.is_some() {
            self.used.insert(name.to_owned());
        }
        if let Some(rows) = adapter.token_rows.get(module_path(name)) {
            let whole = own.unwrap_or(tensor);
            return self.with_rows(name, tensor, whole, rows, dtype);
        }
        let trains = self.trained == Trained::Adapter && adapter.trains(name);
        let own = match own {
            Some(own) => self.folded(&own.to_device(self.device)?, role)?,
            None if trains => tensor.clone(),
            None => return Ok(Weight::Frozen(tensor.to_dtype(dtype)?)),
        };
        anyhow::ensure!(
            own.dims() == tensor.dims(),
            "the adapter's `{name}` has the shape {:?}, expected {:?} from config.json{}",
            own.dims(),
            tensor.dims(),
            resized(name)
        );
        let own = if trains {
            self.train(name.to_owned(), &own, Some(role))?
        } else {
            Weight::Frozen(own.to_dtype(dtype)?)
        };
        Ok(Weight::Replaced {
            base: tensor.to_dtype(dtype)?,
            own: Box::new(own),
        })
    }

    /// The weight called `name` for `tensor` of the base, with rows of the adapter's in `whole`, which is the base's or the adapter's own.
    fn with_rows(
        &mut self,
        name: &str,
        tensor: &Tensor,
        whole: &Tensor,
        rows: &TokenRows,
        dtype: DType,
    ) -> anyhow::Result<Weight> {
        anyhow::ensure!(
            whole.dims() == tensor.dims(),
            "the adapter's `{name}` has the shape {:?}, expected {:?} from config.json{}",
            whole.dims(),
            tensor.dims(),
            resized(name)
        );
        let path = module_path(name);
        let (vocabulary, hidden) = tensor.dims2()?;
        rows.check(path, vocabulary, hidden)?;
        let values = rows.values.to_device(self.device)?;
        let own = if self.trained == Trained::Adapter {
            self.train(format!("{path}{DELTA}"), &values, None)?
        } else {
            Weight::Frozen(values)
        };
        let whole = whole.to_device(self.device)?.to_dtype(dtype)?;
        let rows = ReplacedRows::new(tensor.to_dtype(dtype)?, &whole, rows, own)?;
        Ok(Weight::Rows(Arc::new(rows)))
    }

    /// The embeddings' weight, in `dtype`.
    pub(super) fn embeddings(&mut self, dtype: DType) -> anyhow::Result<Weight> {
        let shape = [self.arch.vocab_size, self.arch.hidden_size];
        self.weight(EMBEDDINGS, &shape, Role::Embeddings, dtype)
    }

    /// The head's weight in `dtype`; `None` if it is tied to the embeddings.
    pub(super) fn head(&mut self, dtype: DType) -> anyhow::Result<Option<Weight>> {
        let tied = self.arch.tie_word_embeddings;
        if !tied {
            let shape = [self.arch.head_rows(), self.arch.hidden_size];
            let name = self.arch.head_name();
            return Ok(Some(self.weight(name, &shape, Role::Head, dtype)?));
        }
        let shape = [self.arch.vocab_size, self.arch.hidden_size];
        if !self.adapter.is_some_and(|adapter| adapter.unties(tied)) {
            return Ok(None);
        }
        let embeddings = self.shaped(EMBEDDINGS, &shape)?;
        Ok(Some(self.effective(
            HEAD,
            &embeddings,
            Role::Head,
            dtype,
        )?))
    }

    /// The pair of the embeddings or the head, if the adapter has one.
    pub(super) fn pair(&mut self, path: &str) -> anyhow::Result<Option<Lora>> {
        let Some(pair) = self.adapter.and_then(|adapter| adapter.tensors.get(path)) else {
            return Ok(None);
        };
        let shape = (self.arch.vocab_size, self.arch.hidden_size);
        Ok(Some(self.lora(path, pair, shape)?))
    }

    /// The type in which a tensor is stored; for a 4-bit one, the type to which it is dequantised.
    pub(super) fn stored(&self, name: &str) -> anyhow::Result<DType> {
        let float = match Nf4::stored_shape(self.weights, name)? {
            Some((_, float)) => Some(float),
            None => Float::from_safetensors(self.weights.raw(name)?.dtype),
        };
        Ok(float.map_or(DType::F32, Float::dtype))
    }

    /// The type in which a frozen matrix is kept for products in the compute dtype. That is its stored type if every value is exact in the
    /// compute dtype, because a narrower type takes less memory and is converted on its way into a product. `tensor` is the name under
    /// which the matrix `name` is stored.
    fn held_dtype(&self, name: &str, tensor: &str) -> anyhow::Result<DType> {
        if self.compute != DType::F32 || self.is_replaced(name) {
            return Ok(self.compute);
        }
        self.stored(tensor)
    }

    pub(super) fn norm(&mut self, layer: usize, norm: NormKind) -> anyhow::Result<Norm> {
        let name = weight_name(&norm_path(self.arch, layer, norm));
        let shape = [norm_shape(self.arch, norm)];
        Ok(Norm {
            weight: self.weight(&name, &shape, Role::Norm(norm), DType::F32)?,
            eps: self.arch.rms_norm_eps,
        })
    }

    fn linear(&mut self, layer: usize, projection: Projection) -> anyhow::Result<Linear> {
        let path = &projection_path(layer, projection);
        let (out, input) = self.arch.shape(projection);
        let name = weight_name(path);
        let base = if let Some(nf4) = Nf4::load(self.weights, &name)? {
            anyhow::ensure!(
                self.trained != Trained::Everything,
                "`{name}` is stored in 4 bits and can't be trained itself; give an adapter"
            );
            anyhow::ensure!(
                nf4.shape == (out, input),
                "the 4-bit tensor `{name}` has the shape {:?}, expected {:?} from config.json",
                nf4.shape,
                (out, input)
            );
            let saved = self
                .adapter
                .is_some_and(|adapter| adapter.config.saves(path));
            anyhow::ensure!(
                !saved
                    && !self
                        .adapter
                        .is_some_and(|adapter| adapter.saved.contains_key(&name)),
                "the adapter trains `{path}` whole, but it is stored in 4 bits; take the dense model"
            );
            Base::Nf4(Arc::new(nf4))
        } else {
            let dtype = self.held_dtype(&name, &name)?;
            let role = Role::Projection(projection);
            Base::Dense(self.weight(&name, &[out, input], role, dtype)?)
        };
        let bias = if self.arch.has_bias(projection) {
            let role = Role::Bias(projection);
            Some(self.weight(&bias_name(path), &[out], role, DType::F32)?)
        } else {
            None
        };
        let pair = self.adapter.and_then(|adapter| adapter.tensors.get(path));
        let lora = match pair {
            Some(pair) => Some(self.lora(path, pair, (out, input))?),
            None => None,
        };
        self.linears += 1;
        Ok(Linear {
            base,
            bias,
            lora,
            compute: self.compute,
            index: self.linears,
        })
    }

    fn lora(
        &mut self,
        path: &str,
        pair: &LoraPair,
        (out, input): (usize, usize),
    ) -> anyhow::Result<Lora> {
        let config = &self.adapter.context("there is no adapter")?.config;
        let r = config.rank(path);
        anyhow::ensure!(
            pair.a.dims() == [r, input] && pair.b.dims() == [out, r],
            "the adapter's pair for `{path}` has the shapes {:?} and {:?}, expected {:?} and {:?}",
            pair.a.dims(),
            pair.b.dims(),
            [r, input],
            [out, r]
        );
        self.used.insert(path.to_owned());
        let (scaling, dropout) = (config.scaling(path), config.lora_dropout);
        let mut weight = |suffix: &str, tensor: &Tensor| -> anyhow::Result<Weight> {
            let tensor = tensor.to_device(self.device)?.to_dtype(DType::F32)?;
            if self.trained == Trained::Adapter {
                self.train(format!("{path}.{suffix}"), &tensor, None)
            } else {
                Ok(Weight::Frozen(tensor))
            }
        };
        let a = weight("lora_A.weight", &pair.a)?;
        let b = weight("lora_B.weight", &pair.b)?;
        let magnitude = pair.magnitude.as_ref();
        let magnitude = magnitude.map(|norms| weight("lora_magnitude_vector", norms));
        Ok(Lora {
            a,
            b,
            magnitude: magnitude.transpose()?,
            scaling,
            dropout,
        })
    }

    fn qkv(&mut self, layer: usize) -> anyhow::Result<Qkv> {
        if self.arch.fused_projections {
            return Ok(Qkv::Fused(self.linear(layer, Projection::Qkv)?));
        }
        Ok(Qkv::Separate {
            q: self.linear(layer, Projection::Q)?,
            k: self.linear(layer, Projection::K)?,
            v: self.linear(layer, Projection::V)?,
        })
    }

    fn gate_up(&mut self, layer: usize) -> anyhow::Result<GateUp> {
        if self.arch.fused_projections {
            return Ok(GateUp::Fused(self.linear(layer, Projection::GateUp)?));
        }
        Ok(GateUp::Separate {
            gate: self.linear(layer, Projection::Gate)?,
            up: self.linear(layer, Projection::Up)?,
        })
    }

    pub(super) fn layer(&mut self, number: usize) -> anyhow::Result<Layer> {
        let arch = self.arch;
        let qkv = self.qkv(number)?;
        let o = self.linear(number, Projection::O)?;
        let gate_up = self.gate_up(number)?;
        let down = self.linear(number, Projection::Down)?;
        let own = layer_norms(arch);
        let mut norm = |norm| {
            let there = own.contains(&norm);
            there.then(|| self.norm(number, norm)).transpose()
        };
        let described = arch.layers.get(number).copied().unwrap_or_default();
        Ok(Layer {
            input_norm: norm(NormKind::Input)?,
            pre_feedforward_norm: norm(NormKind::PreFeedforward)?,
            q_norm: norm(NormKind::Query)?,
            k_norm: norm(NormKind::Key)?,
            post_attention_norm: norm(NormKind::PostAttention)?,
            post_feedforward_norm: norm(NormKind::PostFeedforward)?,
            qkv,
            o,
            gate_up,
            down,
            window: described.window,
            rope: described.rope,
            heads: arch.num_attention_heads,
            kv_heads: arch.num_key_value_heads,
            head_dim: arch.head_dim,
            score_scale: arch.score_scale,
            score_softcap: arch.score_softcap,
            activation: arch.activation,
            residual_scale: arch.residual_scale,
        })
    }
}

impl CausalLm {
    /// Loads a model, with an adapter if there is one. `trained` says which tensors become parameters; products are computed in `compute`
    /// (f32, bf16 or f16).
    ///
    /// # Errors
    /// A tensor is missing or has another shape, the adapter does not fit the model, or what should be trained can't be trained.
    pub fn load(
        arch: &Arch,
        weights: &Weights,
        adapter: Option<&Adapter>,
        trained: Trained,
        compute: DType,
        device: &Device,
    ) -> anyhow::Result<Self> {
        let tied = arch.tie_word_embeddings;
        let adapter = adapter.map(|adapter| adapter.beside(tied)).transpose()?;
        let adapter = adapter.as_deref();
        let mut loader = Loader::new(arch, weights, adapter, trained, compute, device);
        if let Some(adapter) = adapter {
            check_adapter(adapter, arch, trained)?;
        }
        // Only rows of the embeddings are used, which are converted to f32 one by one; if they are the head's weight too, products use them.
        let stored = loader.stored(EMBEDDINGS)?;
        let own_head = !tied || adapter.is_some_and(|adapter| adapter.unties(tied));
        let held_dtype = if own_head {
            stored
        } else {
            loader.held_dtype(EMBEDDINGS, EMBEDDINGS)?
        };
        let embed = loader.embeddings(held_dtype)?;
        let embed_lora = loader.pair(EMBED_TOKENS)?;
        let layers: Vec<_> = (0..arch.num_hidden_layers())
            .map(|number| {
                let layer = loader.layer(number);
                layer.with_context(|| format!("could not load layer {number}"))
            })
            .collect::<anyhow::Result<_>>()?;
        let norm = loader.norm(0, NormKind::Final)?;
        let name = arch.head_name();
        let held_dtype = loader.held_dtype(name, if tied { EMBEDDINGS } else { name })?;
        let head = loader.head(held_dtype)?;
        let head_lora = loader.pair(LM_HEAD)?;
        let (parameters, used) = (loader.parameters, loader.used);
        if let Some(adapter) = adapter {
            let all = adapter.tensors.keys().chain(adapter.saved.keys());
            if let Some(lost) = all.clone().find(|name| !used.contains(*name)) {
                anyhow::bail!(
                    "the adapter has tensors for {} modules, but the model has no place for `{lost}`; was it trained for another \
                     model?",
                    all.count()
                );
            }
        }
        anyhow::ensure!(
            trained == Trained::Nothing || !parameters.is_empty(),
            "there is nothing to train"
        );
        Ok(Self {
            arch: arch.clone(),
            parameters,
            device: device.clone(),
            embed,
            layers,
            norm,
            head,
            embed_lora,
            head_lora,
            compute,
            frozen_column_sum: OnceLock::new(),
            #[cfg(feature = "gpu")]
            on_device: None,
        })
    }
}

/// Fails if the adapter can't be used with a model of this architecture.
fn check_adapter(adapter: &Adapter, arch: &Arch, trained: Trained) -> anyhow::Result<()> {
    let pairs = ENDS.iter().any(|path| adapter.tensors.contains_key(*path));
    anyhow::ensure!(
        trained != Trained::Adapter
            || !(arch.tie_word_embeddings && adapter.config.ensure_weight_tying && pairs),
        "training matrices beside embeddings that the head shares (`ensure_weight_tying`) is not supported; expected the embeddings \
         in `modules_to_save`, or `ensure_weight_tying: false`"
    );
    anyhow::ensure!(
        arch.scores || !adapter.saved.contains_key(SCORE),
        "the adapter has a head that gives scores (`{SCORE}`), and the model has one that gives logits; hint: `add_score_head` makes a \
         model with such a head of it"
    );
    if trained == Trained::Adapter {
        anyhow::ensure!(
            !adapter.config.keeps_b(),
            "`init_lora_weights: mica` trains A alone, which is not supported; the adapter can be scored and merged"
        );
        let modules = modules(arch);
        let meant = modules.iter().find(|(path, module)| {
            *module != Module::Other
                && adapter.config.targets.selection(path) == Selection::Yes
                && !adapter.tensors.contains_key(path)
        });
        if let Some((path, _)) = meant {
            anyhow::bail!(
                "the settings of the adapter mean `{path}` too, but it has no matrices there, which PEFT would begin anew; expected \
                 settings and matrices of the same modules"
            );
        }
    }
    anyhow::ensure!(
        !adapter.config.is_loftq() || arch.quantization.is_some(),
        "the adapter was begun by LoftQ for a 4-bit model, but this one is dense; hint: `quantize` it with `double_quant: false`"
    );
    Ok(())
}
