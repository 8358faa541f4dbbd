//! From a model folder's tensors and an adapter's pairs to a [`Llama`].

use std::collections::BTreeSet;
use std::sync::Arc;

use anyhow::Context as _;
use candle_core::{DType, Device, Tensor, Var};

use super::super::adapter::{Adapter, ENDS, LoraPair, Meant};
use super::arch::{Arch, Projection, QkNorm};
use super::linear::{Base, Linear, Lora, Pass, Weight};
use super::tied::{EMBEDDINGS, HEAD};
use super::{Layer, Llama, Norm, Parameter, Trained};
use crate::ml::io::float::Float;
use crate::ml::io::weights::Weights;
use crate::ml::lora::init::{Module, modules};
use crate::ml::quant::nf4::Nf4;

/// Reads a model's tensors into the places where they are wanted.
pub(super) struct Loader<'a> {
    config: &'a Arch,
    weights: &'a Weights,
    adapter: Option<&'a Adapter>,
    trained: Trained,
    compute: DType,
    device: &'a Device,
    parameters: Vec<Parameter>,
    linears: u64,
    /// The adapter's modules and tensors that found their places.
    used: BTreeSet<String>,
}

/// What to say where a vocabulary's size differs.
fn resized(name: &str) -> &'static str {
    if [EMBEDDINGS, HEAD].contains(&name) {
        "; an adapter that was trained with other tokens needs the model whose embeddings were resized for them"
    } else {
        ""
    }
}

/// What transformers spares from weight decay.
fn decays(name: &str) -> bool {
    !name.contains("norm") && !name.ends_with(".bias")
}

impl<'a> Loader<'a> {
    pub(super) fn new(
        config: &'a Arch,
        weights: &'a Weights,
        adapter: Option<&'a Adapter>,
        trained: Trained,
        compute: DType,
        device: &'a Device,
    ) -> Self {
        Self {
            config,
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

    /// Whether the adapter puts a weight of its own in the place `name`.
    fn is_replaced(&self, name: &str) -> bool {
        self.adapter
            .is_some_and(|adapter| adapter.saved.contains_key(name) || adapter.trains(name))
    }

    /// A tensor of the base in its own type; one in 4 bits is dequantised, and can't be trained or replaced.
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

    fn train(&mut self, name: String, tensor: &Tensor, decays: bool) -> anyhow::Result<Weight> {
        let var = Var::from_tensor(&tensor.to_dtype(DType::F32)?.force_contiguous()?)?;
        self.parameters.push(Parameter {
            name,
            var: var.clone(),
            decays,
        });
        Ok(Weight::Trained(var))
    }

    /// A weight of the base, or what the adapter puts in its place; a frozen one is held in `dtype`.
    fn weight(&mut self, name: &str, shape: &[usize], dtype: DType) -> anyhow::Result<Weight> {
        let tensor = self.shaped(name, shape)?;
        self.placed(name, &tensor, dtype)
    }

    /// What counts where `tensor` of the base has the place `name`.
    fn placed(&mut self, name: &str, tensor: &Tensor, dtype: DType) -> anyhow::Result<Weight> {
        if self.trained == Trained::Everything {
            return self.train(name.to_owned(), tensor, decays(name));
        }
        let Some(adapter) = self.adapter else {
            return Ok(Weight::Frozen(tensor.to_dtype(dtype)?));
        };
        let own = adapter.saved.get(name);
        if own.is_some() {
            self.used.insert(name.to_owned());
        }
        let trains = self.trained == Trained::Adapter && adapter.trains(name);
        let own = match own {
            Some(own) => own.to_device(self.device)?,
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
            self.train(name.to_owned(), &own, decays(name))?
        } else {
            Weight::Frozen(own.to_dtype(dtype)?)
        };
        Ok(Weight::Replaced {
            base: tensor.to_dtype(dtype)?,
            own: Box::new(own),
        })
    }

    /// The embeddings' weight, in `dtype`.
    pub(super) fn embeddings(&mut self, dtype: DType) -> anyhow::Result<Weight> {
        let shape = [self.config.vocab_size, self.config.hidden_size];
        self.weight(EMBEDDINGS, &shape, dtype)
    }

    /// The head's weight, in `dtype`; none where it is the embeddings, whatever these are.
    pub(super) fn head(&mut self, dtype: DType) -> anyhow::Result<Option<Weight>> {
        let shape = [self.config.vocab_size, self.config.hidden_size];
        let tied = self.config.tie_word_embeddings;
        if !tied {
            return Ok(Some(self.weight(HEAD, &shape, dtype)?));
        }
        if !self.adapter.is_some_and(|adapter| adapter.unties(tied)) {
            return Ok(None);
        }
        let embeddings = self.shaped(EMBEDDINGS, &shape)?;
        Ok(Some(self.placed(HEAD, &embeddings, dtype)?))
    }

    /// The pair beside the embeddings or the head, if the adapter has one.
    pub(super) fn pair(&mut self, path: &str) -> anyhow::Result<Option<Lora>> {
        let Some(pair) = self.adapter.and_then(|adapter| adapter.tensors.get(path)) else {
            return Ok(None);
        };
        let shape = (self.config.vocab_size, self.config.hidden_size);
        Ok(Some(self.lora(path, pair, shape)?))
    }

    /// The type in which a tensor is stored; of one in 4 bits, the type that it is dequantised to.
    pub(super) fn stored(&self, name: &str) -> anyhow::Result<DType> {
        let float = match Nf4::shape_of(self.weights, name)? {
            Some((_, float)) => Some(float),
            None => Float::of(self.weights.raw(name)?.dtype),
        };
        Ok(float.map_or(DType::F32, Float::dtype))
    }

    /// The type in which a frozen matrix is held for products in the compute dtype: as it is stored where that loses nothing, for what is
    /// narrower takes less memory and is widened on its way into a product. `tensor` is what is stored for the place `name`.
    fn held(&self, name: &str, tensor: &str) -> anyhow::Result<DType> {
        if self.compute != DType::F32 || self.is_replaced(name) {
            return Ok(self.compute);
        }
        self.stored(tensor)
    }

    pub(super) fn norm(&mut self, name: &str) -> anyhow::Result<Norm> {
        self.norm_of(name, self.config.hidden_size)
    }

    /// The norm of single heads, if the model has them.
    fn head_norm(&mut self, name: &str) -> anyhow::Result<Option<Norm>> {
        match self.config.qk_norm {
            QkNorm::None => Ok(None),
            QkNorm::PerHead => self.norm_of(name, self.config.head_dim).map(Some),
        }
    }

    /// A norm over so many features.
    fn norm_of(&mut self, name: &str, width: usize) -> anyhow::Result<Norm> {
        Ok(Norm {
            weight: self.weight(&format!("{name}.weight"), &[width], DType::F32)?,
            eps: self.config.rms_norm_eps,
        })
    }

    fn linear(
        &mut self,
        path: &str,
        (out, input): (usize, usize),
        bias: bool,
    ) -> anyhow::Result<Linear> {
        let name = format!("{path}.weight");
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
            let dtype = self.held(&name, &name)?;
            Base::Dense(self.weight(&name, &[out, input], dtype)?)
        };
        let bias = if bias {
            Some(self.weight(&format!("{path}.bias"), &[out], DType::F32)?)
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
                self.train(format!("{path}.{suffix}"), &tensor, true)
            } else {
                Ok(Weight::Frozen(tensor))
            }
        };
        let a = weight("lora_A.weight", &pair.a)?;
        let b = weight("lora_B.weight", &pair.b)?;
        let magnitude = pair.magnitude.as_ref();
        let magnitude = magnitude.map(|lengths| weight("lora_magnitude_vector", lengths));
        Ok(Lora {
            a,
            b,
            magnitude: magnitude.transpose()?,
            scaling,
            dropout,
        })
    }

    pub(super) fn layer(&mut self, number: usize) -> anyhow::Result<Layer> {
        let config = self.config;
        let path = format!("model.layers.{number}");
        let mut linear = |name: &str, projection| {
            let path = format!("{path}.{name}");
            self.linear(&path, config.shape(projection), config.has_bias(projection))
        };
        Ok(Layer {
            q: linear("self_attn.q_proj", Projection::Q)?,
            k: linear("self_attn.k_proj", Projection::K)?,
            v: linear("self_attn.v_proj", Projection::V)?,
            o: linear("self_attn.o_proj", Projection::O)?,
            gate: linear("mlp.gate_proj", Projection::Gate)?,
            up: linear("mlp.up_proj", Projection::Up)?,
            down: linear("mlp.down_proj", Projection::Down)?,
            input_norm: self.norm(&format!("{path}.input_layernorm"))?,
            post_norm: self.norm(&format!("{path}.post_attention_layernorm"))?,
            q_norm: self.head_norm(&format!("{path}.self_attn.q_norm"))?,
            k_norm: self.head_norm(&format!("{path}.self_attn.k_norm"))?,
            window: config.layers.get(number).and_then(|layer| layer.window),
            heads: config.num_attention_heads,
            kv_heads: config.num_key_value_heads,
            head_dim: config.head_dim,
        })
    }
}

impl Llama {
    /// Reads a model, with an adapter if given. Products run in `compute` (f32, bf16 or f16).
    pub fn load(
        config: &Arch,
        weights: &Weights,
        adapter: Option<&Adapter>,
        trained: Trained,
        compute: DType,
        device: &Device,
    ) -> anyhow::Result<Self> {
        let tied = config.tie_word_embeddings;
        let adapter = adapter.map(|adapter| adapter.beside(tied)).transpose()?;
        let adapter = adapter.as_deref();
        let mut loader = Loader::new(config, weights, adapter, trained, compute, device);
        if let Some(adapter) = adapter {
            fits(adapter, config, trained)?;
        }
        // Only rows of it are used, made f32 one by one; where it is the head's weight too, products are made with it.
        let stored = loader.stored(EMBEDDINGS)?;
        let own_head = !tied || adapter.is_some_and(|adapter| adapter.unties(tied));
        let held = if own_head {
            stored
        } else {
            loader.held(EMBEDDINGS, EMBEDDINGS)?
        };
        let embed = loader.embeddings(held)?;
        let embed_lora = loader.pair(ENDS[0])?;
        let layers: Vec<_> = (0..config.num_hidden_layers())
            .map(|number| {
                let layer = loader.layer(number);
                layer.with_context(|| format!("could not load layer {number}"))
            })
            .collect::<anyhow::Result<_>>()?;
        let norm = loader.norm("model.norm")?;
        let held = loader.held(HEAD, if tied { EMBEDDINGS } else { HEAD })?;
        let head = loader.head(held)?;
        let head_lora = loader.pair(ENDS[1])?;
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
        let mut model = Self {
            arch: config.clone(),
            parameters,
            device: device.clone(),
            embed,
            layers,
            norm,
            head,
            embed_lora,
            head_lora,
            compute,
            frozen_column_sum: None,
        };
        if model.head().is_frozen() {
            model.frozen_column_sum = Some(model.column_sum(Pass::BASE)?);
        }
        Ok(model)
    }
}

/// Whether a model of this shape can bear the adapter at all.
fn fits(adapter: &Adapter, config: &Arch, trained: Trained) -> anyhow::Result<()> {
    let pairs = ENDS.iter().any(|path| adapter.tensors.contains_key(*path));
    anyhow::ensure!(
        trained != Trained::Adapter
            || !(config.tie_word_embeddings && adapter.config.ensure_weight_tying && pairs),
        "training matrices beside embeddings that the head shares (`ensure_weight_tying`) is not supported; expected the embeddings \
         in `modules_to_save`, or `ensure_weight_tying: false`"
    );
    if trained == Trained::Adapter {
        anyhow::ensure!(
            !adapter.config.keeps_b(),
            "`init_lora_weights: mica` trains A alone, which is not supported; the adapter can be scored and merged"
        );
        let modules = modules(config);
        let meant = modules.iter().find(|(path, module)| {
            *module != Module::Other
                && adapter.config.targets.mean(path) == Meant::Yes
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
        !adapter.config.is_loftq() || config.quantization.is_some(),
        "the adapter was begun by LoftQ for a 4-bit model, but this one is dense; hint: `quantize` it with `double_quant: false`"
    );
    Ok(())
}

impl Layer {
    pub(in crate::ml) fn linears(&self) -> [&Linear; 7] {
        [
            &self.q, &self.k, &self.v, &self.o, &self.gate, &self.up, &self.down,
        ]
    }
}
