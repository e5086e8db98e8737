// The ops of clext as C++ functions; ops.cpp holds their schemas and what each one means.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "torch/check.h"

namespace clext {

at::Tensor quadratic_penalty(at::TensorList params, at::TensorList anchors,
                             at::TensorList importances);
std::vector<at::Tensor> quadratic_penalty_backward(const at::Tensor& grad, at::TensorList params,
                                                   at::TensorList anchors,
                                                   at::TensorList importances);
at::Tensor add_quadratic_penalty_grad_(at::TensorList grads, at::TensorList params,
                                       at::TensorList anchors, at::TensorList importances,
                                       double strength);
void accumulate_path_integral_(at::TensorList path, at::TensorList params, at::TensorList starts,
                               at::TensorList task_grads);
void riemannian_walk_step_(at::TensorList path, at::TensorList fisher, at::TensorList params,
                           at::TensorList starts, at::TensorList task_grads, double decay);
void accumulate_riemannian_walk_score_(at::TensorList task_score, at::TensorList path,
                                       at::TensorList interval_start, at::TensorList fisher,
                                       at::TensorList params, double eps);
void accumulate_square_(at::TensorList acc, at::TensorList grads, double scale);
void accumulate_abs_(at::TensorList acc, at::TensorList grads, double scale);
void sliced_importance_(at::TensorList acc, at::TensorList jacobian, const at::Tensor& slices,
                        double scale);
at::Tensor per_sample_sum(const at::Tensor& features, const at::Tensor& grads,
                          std::string_view function);
at::Tensor gradient_gram(at::TensorList rows, at::TensorList grads);
void project_gradient_(at::TensorList grads, at::TensorList rows, const at::Tensor& weights);
void consolidate_importance_(at::TensorList importances, at::TensorList anchors,
                             at::TensorList estimate, at::TensorList params, double gamma);
at::Tensor consolidate_all_anchors_(at::TensorList importances, at::TensorList anchors,
                                    at::TensorList estimate, at::TensorList params, double gamma);
void consolidate_path_integral_(at::TensorList importances, at::TensorList anchors,
                                at::TensorList path, at::TensorList params, double xi,
                                bool clamp_total);
void consolidate_riemannian_walk_(at::TensorList importances, at::TensorList anchors,
                                  at::TensorList score, at::TensorList task_score,
                                  at::TensorList fisher, at::TensorList params, double mix);
at::Tensor sgd_step_(at::TensorList params, at::TensorList grads, at::TensorList momentum_buffers,
                     at::TensorList steps, at::TensorList path, at::TensorList fisher,
                     at::TensorList anchors, at::TensorList importances, const at::Tensor& lr,
                     double momentum, double dampening, double weight_decay, bool nesterov,
                     bool maximize, double strength, double decay, bool proximal, bool clear_grad,
                     const std::optional<at::Tensor>& grad_scale,
                     const std::optional<at::Tensor>& found_inf,
                     const std::optional<at::Tensor>& clip);
at::Tensor adam_step_(at::TensorList params, at::TensorList grads, at::TensorList exp_avgs,
                      at::TensorList exp_avg_sqs, at::TensorList steps, at::TensorList path,
                      at::TensorList fisher, at::TensorList anchors, at::TensorList importances,
                      const at::Tensor& lr, double beta1, double beta2, double eps,
                      double weight_decay, bool decoupled, bool maximize, double strength,
                      double decay, bool proximal, bool clear_grad,
                      const std::optional<at::Tensor>& grad_scale,
                      const std::optional<at::Tensor>& found_inf,
                      const std::optional<at::Tensor>& clip);

}  // namespace clext
